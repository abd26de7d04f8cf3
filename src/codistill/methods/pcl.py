"""PCL: peer collaborative learning (Wu & Gong, AAAI 2021): an ensemble teacher, and the mean teachers of the peers.

    z_en = W [f_1; ...; f_m] + b                                        one linear classifier on all features
    L = CE(z_en, y) + sum_i CE(z_i, y)
        + w(e) sum_i T^2 KL(sg z_en || z_i)                             peer ensemble teacher
        + w(e) 1/(m-1) sum_i sum_{j != i} T^2 KL(sg z_j^mt || z_i)      every other peer's mean teacher
    theta_mt <- phi theta_mt + (1 - phi) theta,  phi = min(1 - 1/(g + 1), 0.999),  step g = 0, 1, ...

View i of an image, augmented on its own, goes to peer i and to its mean teacher. Teachers use batch statistics when
they make targets; their running statistics are averaged like the weights, for evaluation. w(e) ramps up over epochs
(never epoch / lambda, as in a public re-implementation). Deployed is peer 0; its mean teacher and the ensemble are
options.
Shapes: P peers (m), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from codistill.config.methods import MethodConfig
from codistill.losses import cross_entropy, kl_from_log_probs, soften
from codistill.methods.base import Method, PeerInfo, Terms, join
from codistill.peers.base import PeerOutputs


class PCL(Method):
    """Peers taught by their ensemble and by each other's mean teachers; see the module's docstring.

    Args:
        num_peers: Peers m, at least 2.
        feature_dims: Width of each peer's features; they may differ.
        num_classes: Classes C.
        temperature: T.
        weight: Weight of both distillation terms after the ramp.
        ramp_epochs: Length of the ramp.
        ema_decay: Most that a mean teacher keeps of itself.
        own_views: Whether every peer has a view of its own.
    """

    name = "pcl"
    citation = "Wu, Gong: Peer Collaborative Learning for Online Knowledge Distillation. AAAI 2021"

    def __init__(
        self,
        num_peers: int,
        feature_dims: Sequence[int],
        num_classes: int,
        temperature: float = 3.0,
        weight: float = 1.0,
        ramp_epochs: float | None = 80.0,
        ema_decay: float = 0.999,
        own_views: bool = True,
    ) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"features", "ema"} | ({"views"} if own_views else set()))
        self.temperature, self.weight, self.ema_decay = temperature, weight, ema_decay
        self.ramp_epochs = 80.0 if ramp_epochs is None else ramp_epochs
        self.classifier = nn.Linear(sum(feature_dims), num_classes)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build it for peers of any widths."""
        return cls(info.num_peers, info.feature_dims, info.num_classes, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `ce_teacher` and `targets_PBC` (the mean teachers') are for inspection."""
        self.check(outputs)
        assert outputs.ema_logits_PBC is not None
        z_PBC = outputs.logits_PBC
        ensemble_BC = self.classifier(torch.cat(outputs.features, -1))
        ce_teacher = cross_entropy(ensemble_BC, targets_B)
        from_ensemble_P = kl_from_log_probs(z_PBC, soften(ensemble_BC.detach(), self.temperature), self.temperature)
        log_mean_PBC = soften(outputs.ema_logits_PBC.detach(), self.temperature)
        kl_PP = kl_from_log_probs(z_PBC.unsqueeze(1), log_mean_PBC.unsqueeze(0), self.temperature)
        others_PP = 1 - torch.eye(self.num_peers, dtype=kl_PP.dtype, device=kl_PP.device)
        from_peers_P = (kl_PP * others_PP).sum(1) / (self.num_peers - 1)
        distill_P = from_ensemble_P + from_peers_P
        terms = join(cross_entropy(z_PBC, targets_B), distill_P, weight * self.weight, targets_PBC=log_mean_PBC)
        terms["loss"] = terms["loss"] + ce_teacher
        return terms | {"ce_teacher": ce_teacher.detach()}

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Return the ensemble teacher's log-probabilities (the paper's PCL-E)."""
        return self.classifier(torch.cat(outputs.features, -1)).log_softmax(-1)
