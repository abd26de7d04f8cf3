"""OKDDip: online knowledge distillation with diverse peers (Chen et al., AAAI 2020).

m - 1 auxiliary peers teach each other through attention, and together they teach a group leader, who is deployed:

    alpha_ab = softmax_b((W_L h_a) . (W_E h_b))                            per sample
    t_a      = sum_b alpha_ab softmax(z_b / T)                             first level
    t_lead   = mean_a softmax(z_a / T)                                     second level
    L = sum_a CE(z_a, y) + CE(z_lead, y) + w(e) T^2 [sum_a KL(t_a || q_a) + KL(t_lead || q_lead)]

Where the sources differ: the paper mixes probabilities (above), its code mixes logits and softens afterwards, and adds
1e-7 to every target probability (`variant="okddip_code"`). The ramp w(e) is the code's; the paper's loss has none.
Neither detaches a target. Members are summed, not averaged.
Shapes: P members, the leader last; A = P - 1 auxiliary peers; B batch; C classes; D features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codistill.config import MethodConfig, OKDDipConfig
from codistill.losses import (
    SOURCE_EPS,
    attention_log_weights,
    cross_entropy,
    entropy,
    mix_log_probs,
    mix_logits,
    mixture_kl,
    soften,
)
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class OKDDip(Method):
    """Two-level distillation among diverse peers; see the module's docstring for the equations.

    Args:
        num_peers: Members, the leader (the last one) included; at least 3.
        feature_dim: Width D of the auxiliary peers' features; the projections go from D to D // 8.
        options: The fields of `OKDDipConfig`; give `ramp_epochs` in a run of your own that is shorter than the 300
            epochs of OKDDip's code, since the default ramp of 80 epochs is only scaled to the length of a run by
            `codistill.train`.
        seed: Under `ablation="no_leader"` member seed % num_peers is deployed.

    Raises:
        InputError: the features are too narrow to project.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(4, 8, 10), [torch.zeros(8, 64)] * 4)
    >>> terms = OKDDip(num_peers=4, feature_dim=64)(outputs, torch.arange(8))
    >>> terms["attention_BAA"].shape, terms["loss"].item()  # 4 log 10
    (torch.Size([8, 3, 3]), 9.210...)
    """

    name = "okddip"
    citation = "Chen, Mei, Wang, Feng, Chen: Online Knowledge Distillation with Diverse Peers. AAAI 2020"

    @takes_options(OKDDipConfig)
    def __init__(self, num_peers: int, feature_dim: int, options: OKDDipConfig, seed: int = 0) -> None:
        super().__init__(num_peers)
        ablation = options.ablation
        self.needs = frozenset({"features"} if ablation in ("none", "symmetric", "no_leader") else ())
        self.variant, self.temperature, self.detach = options.variant, options.temperature, options.detach
        self.weight, self.ramp_epochs = options.weight, options.ramp_length()
        self.mask_self, self.ablation, self.entropy_weight = options.mask_self, ablation, options.entropy_weight
        self.divergence = Divergence(options, self.temperature, SOURCE_EPS if self.variant == "okddip_code" else 0.0)
        # With "random", all processes make one draw for the batch.
        self.needs_full_batch = ablation == "random" or self.divergence.needs_full_batch
        self.has_leader = ablation != "no_leader"
        if self.has_leader:
            self.deployed = num_peers - 1
            self.group = tuple(range(num_peers - 1))
        else:
            self.deployed = seed % num_peers
        if ablation in ("none", "no_leader"):
            if feature_dim < 8:
                raise InputError(
                    f"okddip projects D features to D // 8; --model has D = {feature_dim}, give a wider one"
                )
            self.query = nn.Linear(feature_dim, feature_dim // 8, bias=False)
            self.key = nn.Linear(feature_dim, feature_dim // 8, bias=False)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; the auxiliary peers share the projections, so their features must have one width.

        Raises:
            InputError: they have not.
        """
        options: dict[str, Any] = dataclasses.asdict(config)
        auxiliary = info.feature_dims if options["ablation"] == "no_leader" else info.feature_dims[:-1]
        if len(set(auxiliary)) > 1 and options["ablation"] in ("none", "no_leader", "symmetric"):
            raise InputError(
                f"okddip compares auxiliary peers' features; --model gives widths {', '.join(map(str, auxiliary))}: "
                "give them one width (the leader, last, may differ), or --method.ablation mean"
            )
        return cls(info.num_peers, auxiliary[0], seed=info.seed, **options)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `attention_BAA` and `targets_PBC` are for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        num_auxiliary = len(self.group)
        ce_P = cross_entropy(z_PBC, targets_B)
        attention, rows = None, []
        if self.ablation == "entropy":
            mean_entropy_A = entropy(z_PBC[:num_auxiliary]) / num_auxiliary
            ce_P = torch.cat((ce_P[:num_auxiliary] - self.entropy_weight * mean_entropy_A, ce_P[num_auxiliary:]))
        else:
            log_attention = self._log_attention(outputs.features[:num_auxiliary], z_PBC[:num_auxiliary])
            attention, rows = log_attention.exp(), [log_attention]
        if self.has_leader:  # who learns from the mean of all
            rows.append(z_PBC.new_full((z_PBC.shape[1], 1, num_auxiliary), -math.log(num_auxiliary)))
        distill_P, targets_PBC = self._distill(torch.cat(rows, 1), z_PBC, targets_B)
        return combine_terms(ce_P, distill_P, weight * self.weight, targets_PBC=targets_PBC, attention_BAA=attention)

    def _log_attention(self, features: list[Tensor], z_ABC: Tensor) -> Tensor:
        """Return log alpha, `B x A x A`."""
        num_auxiliary, batch = z_ABC.shape[:2]
        if self.ablation in ("random", "mean"):
            draw = torch.randn if self.ablation == "random" else torch.zeros
            scores = draw(batch, num_auxiliary, num_auxiliary, device=z_ABC.device, dtype=z_ABC.dtype)
            if self.mask_self:
                diagonal = torch.eye(num_auxiliary, dtype=torch.bool, device=scores.device)
                scores = scores.masked_fill(diagonal, -math.inf)
            return scores.log_softmax(-1)
        if self.ablation == "symmetric":
            h_ABD = torch.stack(features)
            return attention_log_weights(h_ABD, h_ABD, self.mask_self)
        # Projected one by one: the features of all peers would be larger than all logits where they are wide.
        query_ABE, key_ABE = (torch.stack([project(h_BD) for h_BD in features]) for project in (self.query, self.key))
        return attention_log_weights(query_ABE, key_ABE, self.mask_self)

    def _distill(self, log_weights: Tensor, z_PBC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return every member's distillation term, `P`, and the softened log-probabilities of its mixture.

        Args:
            log_weights: Of each mixture, `B x P x A`, or `B x 1 x A` if the leader alone has one.
            z_PBC: All members' logits.
            targets_B: Labels.
        """
        num_auxiliary = len(self.group)
        if self.variant == "paper" and self.divergence.is_plain_kl and self.detach != "all":
            distill, targets = mixture_kl(z_PBC, log_weights, self.temperature, detach_sources=self.detach == "peers")
            return F.pad(distill, (len(z_PBC) - len(targets), 0)), targets
        source = z_PBC[:num_auxiliary] if self.detach == "none" else z_PBC[:num_auxiliary].detach()
        if self.variant == "paper":
            targets = mix_log_probs(log_weights, source, self.temperature)
        else:
            targets = soften(mix_logits(log_weights.exp(), source), self.temperature)
        taught = targets.detach() if self.detach == "all" else targets
        distill = self.divergence(z_PBC[-len(targets) :], taught, targets_B)
        return F.pad(distill, (len(z_PBC) - len(targets), 0)), targets
