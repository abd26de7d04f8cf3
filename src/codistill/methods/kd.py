"""Classic knowledge distillation (Hinton, Vinyals, Dean, 2015): the comparison with a trained teacher.

    paper:        L = (1 - a) CE(z, y) + a T^2 KL(softmax(z_T / T) || softmax(z / T)),   a = 0.9, T = 4
    okddip_code:  L = CE(z, y) + a T^2 KL(softmax(z_T / T) + 1e-7 || softmax(z / T)),    a = 1, T = 3

The teacher z_T is in evaluation mode and gets no gradient. Several members each learn from it alone.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor

from codistill.config.methods import KDConfig, MethodConfig
from codistill.losses import cross_entropy, kl_from_log_probs, soften
from codistill.methods.base import Method, PeerInfo, Terms, join
from codistill.peers.base import PeerOutputs

GUARD = 1e-7


class KD(Method):
    """Distillation from a fixed teacher.

    Args:
        num_peers: Members.
        variant: `paper` (Hinton's mixture) or `okddip_code`.
        temperature: T; default the variant's.
        alpha: a; default the variant's.
    """

    name = "kd"
    citation = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network. 2015"

    def __init__(
        self, num_peers: int = 1, variant: str = "paper", temperature: float | None = None, alpha: float | None = None
    ) -> None:
        super().__init__(num_peers)
        paper = variant == "paper"
        self.needs = frozenset({"teacher"})
        self.temperature = temperature or (4.0 if paper else 3.0)
        self.alpha = (0.9 if paper else 1.0) if alpha is None else alpha
        self.ce_weight = 1 - self.alpha if paper else 1.0
        self.guard = 0.0 if paper else GUARD

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build it; the teacher is the loop's affair."""
        assert isinstance(config, KDConfig)
        return cls(info.num_peers, config.variant, config.temperature, config.alpha)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `outputs.teacher_logits_BC` holds the teacher's logits."""
        self.check(outputs)
        assert outputs.teacher_logits_BC is not None
        log_target_BC = soften(outputs.teacher_logits_BC.detach(), self.temperature)
        ce_P = cross_entropy(outputs.logits_PBC, targets_B)
        distill_P = kl_from_log_probs(outputs.logits_PBC, log_target_BC, self.temperature, self.guard)
        terms = join(ce_P, distill_P, weight * self.alpha, ce_weight=self.ce_weight)
        return terms | {"targets_PBC": log_target_BC.expand_as(outputs.logits_PBC)}
