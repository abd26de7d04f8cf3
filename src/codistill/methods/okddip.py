"""OKDDip: online knowledge distillation with diverse peers (Chen et al., AAAI 2020).

m - 1 auxiliary peers teach each other through attention, and together they teach a group leader, who is deployed:

    alpha_ab = softmax_b((W_L h_a) . (W_E h_b))                            per sample
    t_a      = sum_b alpha_ab softmax(z_b / T)                             first level
    t_lead   = mean_a softmax(z_a / T)                                     second level
    L = sum_a CE(z_a, y) + CE(z_lead, y) + w(e) T^2 [sum_a KL(t_a || q_a) + KL(t_lead || q_lead)]

Where the sources differ: the paper mixes probabilities (above), its code mixes logits and softens afterwards, and adds
1e-7 to every target probability (`variant="okddip_code"`). Neither detaches a target. Members are summed, not averaged.
Shapes: P members, the leader last; A = P - 1 auxiliary peers; B batch; C classes; D features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from codistill.config import MethodConfig, OKDDipConfig
from codistill.losses import (
    SOURCE_EPS,
    attention_log_weights,
    cross_entropy,
    entropy,
    kl_from_log_probs,
    mix_log_probs,
    mix_logits,
    soften,
)
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class OKDDip(Method):
    """Two-level distillation among diverse peers; see the module's docstring for the equations.

    Args:
        num_peers: Members, the leader (the last one) included; at least 3.
        feature_dim: Width D of the auxiliary peers' features; the projections go from D to D // 8.
        options: The fields of `OKDDipConfig`; the default ramp is 80 epochs.
        seed: Chooses the member that is deployed under `ablation="no_leader"`.

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
        self.needs_full_batch = ablation == "random"  # all processes make one draw for the batch
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
        z_ABC = z_PBC[:num_auxiliary]
        ce_P = cross_entropy(z_PBC, targets_B)
        if self.ablation == "entropy":
            distill_A = torch.zeros_like(ce_P[:num_auxiliary])
            ce_P = torch.cat(
                (ce_P[:num_auxiliary] - self.entropy_weight * entropy(z_ABC) / num_auxiliary, ce_P[num_auxiliary:])
            )
            targets, log_attention = [], None
        else:
            log_attention = self._log_attention(outputs.features[:num_auxiliary], z_ABC)
            targets = [self._mix(log_attention, z_ABC)]
            distill_A = self._kl(z_ABC, targets[0])
        if not self.has_leader:
            distill_P = distill_A
        else:
            uniform = z_ABC.new_full((z_ABC.shape[1], 1, num_auxiliary), -math.log(num_auxiliary))
            targets.append(self._mix(uniform, z_ABC))
            distill_P = torch.cat((distill_A, self._kl(z_PBC[-1:], targets[-1])))
        attention = None if log_attention is None else log_attention.exp()
        return combine_terms(
            ce_P, distill_P, weight * self.weight, targets_PBC=torch.cat(targets), attention_BAA=attention
        )

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
        h_ABD = torch.stack(features)
        query, key = (h_ABD, h_ABD) if self.ablation == "symmetric" else (self.query(h_ABD), self.key(h_ABD))
        return attention_log_weights(query, key, self.mask_self)

    def _mix(self, log_weights: Tensor, z_ABC: Tensor) -> Tensor:
        """Return the softened log-probabilities of each mixture, by the variant and `detach`."""
        z_ABC = z_ABC if self.detach == "none" else z_ABC.detach()
        if self.variant == "paper":
            mixed = mix_log_probs(log_weights, z_ABC, self.temperature)
        else:
            mixed = soften(mix_logits(log_weights.exp(), z_ABC), self.temperature)
        return mixed.detach() if self.detach == "all" else mixed

    def _kl(self, z_PBC: Tensor, log_target_PBC: Tensor) -> Tensor:
        eps = SOURCE_EPS if self.variant == "okddip_code" else 0.0
        return kl_from_log_probs(z_PBC, log_target_PBC, self.temperature, eps)
