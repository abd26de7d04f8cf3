"""DML: deep mutual learning (Zhang et al., CVPR 2018): networks learn from each other's predictions.

    paper:        L_i = CE(z_i, y) + 1/(K-1) sum_{j != i} KL(p_j || p_i),   p = softmax(z), T = 1, p_j constant
    target=mean:  L_i = CE(z_i, y) + T^2 KL(softmax(m_i / T) || softmax(z_i / T)),   m_i = mean_{j != i} z_j

Where the sources differ: the authors' code sums over the others, and guards its logarithm,
KL = sum p_j log(1e-8 + p_j / (p_i + 1e-8)) (`variant="authors"`); OKDDip's code uses T = 3, adds 1e-7 to the target,
steps all networks at once and detaches nothing (`variant="okddip_code"`). The paper updates one network after the
other, each on fresh predictions (`update="alternating"`). T other than 1 comes with T^2.
Shapes: P peers (K in the paper), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

from codistill.config.methods import DMLConfig, MethodConfig
from codistill.losses import cross_entropy, kl_from_log_probs, leave_one_out_mean, soften
from codistill.methods.base import Method, PeerInfo, Terms, join
from codistill.peers.base import PeerOutputs


class DML(Method):
    """Mutual learning; see the module's docstring for the equations.

    Args:
        num_peers: Networks K, at least 2.
        variant: `paper`, `authors` or `okddip_code`.
        target: `pairwise`, or `mean` of the others' logits.
        temperature: T; default the variant's (1, 1, 3).
        weight: Weight of the distillation terms.
        update: `joint` or `alternating`; default joint for `okddip_code`, alternating else.
    """

    name = "dml"
    citation = "Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning. CVPR 2018"

    def __init__(
        self,
        num_peers: int,
        variant: str = "paper",
        target: str = "pairwise",
        temperature: float | None = None,
        weight: float = 1.0,
        update: str | None = None,
    ) -> None:
        super().__init__(num_peers)
        code = variant == "okddip_code"
        self.variant, self.target, self.weight = variant, target, weight
        self.temperature = temperature or (3.0 if code else 1.0)
        self.detach = not code
        self.update = update or ("joint" if code else "alternating")  # type: ignore[assignment]

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build it; branches share a trunk and so are stepped jointly."""
        assert isinstance(config, DMLConfig)
        options = dataclasses.asdict(config)
        if info.trunk_dim is not None:
            options["update"] = "joint"
        return cls(info.num_peers, **options)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `targets_PBC` (target=mean) is for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        source_PBC = z_PBC.detach() if self.detach else z_PBC
        ce_P = cross_entropy(z_PBC, targets_B)
        if self.target == "mean":
            log_target_PBC = soften(leave_one_out_mean(source_PBC), self.temperature)
            distill_P = self._kl(z_PBC, log_target_PBC)
            return join(ce_P, distill_P, weight * self.weight, targets_PBC=log_target_PBC)
        log_source_PBC = soften(source_PBC, self.temperature)
        kl_PP = self._kl(z_PBC.unsqueeze(1), log_source_PBC.unsqueeze(0))  # [i, j] = KL(p_j || p_i)
        others_PP = 1 - torch.eye(self.num_peers, dtype=kl_PP.dtype, device=kl_PP.device)
        distill_P = (kl_PP * others_PP).sum(1)
        if self.variant != "authors":
            distill_P = distill_P / (self.num_peers - 1)
        return join(ce_P, distill_P, weight * self.weight)

    def _kl(self, student: Tensor, log_target: Tensor) -> Tensor:
        if self.variant != "authors":
            return kl_from_log_probs(student, log_target, self.temperature, 0.0 if self.detach else 1e-7)
        target, probs = log_target.exp(), (student / self.temperature).softmax(-1)
        pointwise = target * (1e-8 + target / (probs + 1e-8)).log()
        return pointwise.sum(-1).mean(-1) * self.temperature**2
