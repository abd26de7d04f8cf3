"""PCL: peer collaborative learning (Wu & Gong, AAAI 2021): an ensemble teacher, and the mean teachers of the peers.

    z_en = W [f_1; ...; f_m] + b                                        one linear classifier on all features
    L = CE(z_en, y) + sum_i CE(z_i, y)
        + w(e) sum_i T^2 KL(sg z_en || z_i)                             peer ensemble teacher
        + w(e) 1/(m-1) sum_i sum_{j != i} T^2 KL(sg z_j^mt || z_i)      every other peer's mean teacher
    theta_mt <- phi theta_mt + (1 - phi) theta,  phi = min(1 - 1/(g + 1), 0.999),  step g = 0, 1, ...

No code was released; this is as notes on the paper give it. View i of an image, augmented separately, goes to peer i
and to its mean teacher. Mean teachers use batch statistics for the targets; their running statistics are averaged like
the weights, for evaluation. w(e) ramps up over epochs (not epoch / lambda, as in a public re-implementation). Peer 0 is
deployed; its mean teacher and the ensemble are options.
Shapes: P peers (m), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from codistill.config import MethodConfig, PCLConfig
from codistill.losses import cross_entropy, soften, weighted_kl
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs


class PCL(Method):
    """Peers taught by their ensemble and by each other's mean teachers; see the module's docstring.

    Args:
        num_peers: Peers m, at least 2.
        feature_dims: Width of each peer's features; they may differ.
        num_classes: Classes C.
        options: The fields of `PCLConfig`; the default ramp is 80 epochs.

    >>> from codistill.peers import PeerOutputs
    >>> logits_PBC = torch.zeros(3, 8, 10)
    >>> outputs = PeerOutputs(logits_PBC, [torch.zeros(8, 64)] * 3, ema_logits_PBC=logits_PBC)
    >>> PCL(num_peers=3, feature_dims=[64] * 3, num_classes=10)(outputs, torch.arange(8))["ce_P"]
    tensor([2.3026, 2.3026, 2.3026])
    """

    name = "pcl"
    citation = "Wu, Gong: Peer Collaborative Learning for Online Knowledge Distillation. AAAI 2021"

    @takes_options(PCLConfig)
    def __init__(self, num_peers: int, feature_dims: Sequence[int], num_classes: int, options: PCLConfig) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"features", "ema"} | ({"views"} if options.own_views else set()))
        self.temperature, self.weight, self.ema_decay = options.temperature, options.weight, options.ema_decay
        self.ramp_epochs = options.ramp_length()
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch
        self.classifier = nn.Linear(sum(feature_dims), num_classes)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; the widths of the peers may differ."""
        return cls(info.num_peers, info.feature_dims, info.num_classes, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `ce_teacher` and `targets_PBC` (the mean teachers') are for inspection."""
        self.check(outputs)
        assert outputs.ema_logits_PBC is not None
        z_PBC = outputs.logits_PBC
        ensemble_BC = self._classify(outputs.features)
        ce_teacher = cross_entropy(ensemble_BC, targets_B)
        mean_PBC, teacher_BC = outputs.ema_logits_PBC.detach(), ensemble_BC.detach()
        if self.divergence.is_plain_kl:
            # The ensemble is one more target of everyone, after the mean teachers.
            log_teachers = _soften_together(mean_PBC, teacher_BC, self.temperature)
            log_mean_PBC = log_teachers[:-1]
            from_others_PP = 1 - torch.eye(self.num_peers, dtype=z_PBC.dtype, device=z_PBC.device)
            from_others_PP = from_others_PP / (self.num_peers - 1)
            weights = torch.cat((from_others_PP, torch.ones_like(from_others_PP[:, :1])), 1)
            distill_P = weighted_kl(soften(z_PBC, self.temperature), log_teachers, weights) * self.temperature**2
        else:
            log_mean_PBC = soften(mean_PBC, self.temperature)
            from_peers_P = self.divergence.pairwise(z_PBC, mean_PBC, targets_B) / (self.num_peers - 1)
            distill_P = self.divergence(z_PBC, soften(teacher_BC, self.temperature), targets_B) + from_peers_P
        terms = combine_terms(
            cross_entropy(z_PBC, targets_B), distill_P, weight * self.weight, targets_PBC=log_mean_PBC
        )
        terms["loss"] = terms["loss"] + ce_teacher
        return terms | {"ce_teacher": ce_teacher.detach()}

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Return the ensemble teacher's log-probabilities (the paper's PCL-E)."""
        return self._classify(outputs.features).log_softmax(-1)

    def _classify(self, features: Sequence[Tensor]) -> Tensor:
        """Return W [f_1; ...; f_m] + b, `B x C`.

        Features that are wider than all logits take one product per peer, because joined they would be the largest
        tensor of the losses. Else one product is faster: no gradients of parts of W have to be joined.
        """
        widths = [feature_BD.shape[-1] for feature_BD in features]
        if sum(widths) <= len(features) * self.classifier.out_features:
            return self.classifier(torch.cat(tuple(features), 1))
        logits_BC = self.classifier.bias
        for feature_BD, weight_CD in zip(features, self.classifier.weight.split(widths, 1)):
            logits_BC = torch.addmm(logits_BC, feature_BD, weight_CD.t())
        return logits_BC


def _soften_together(logits_PBC: Tensor, more_BC: Tensor, temperature: float) -> Tensor:
    """Return `soften` of both, one after the other; `torch.cat` before it would copy all logits once more."""
    dtype = torch.promote_types(logits_PBC.dtype, more_BC.dtype)
    scaled = logits_PBC.new_empty((len(logits_PBC) + 1, *more_BC.shape), dtype=dtype)
    torch.div(logits_PBC, temperature, out=scaled[:-1])
    torch.div(more_BC, temperature, out=scaled[-1])
    return scaled.log_softmax(-1)
