"""Classic knowledge distillation (Hinton, Vinyals, Dean, 2015): the comparison with a trained teacher.

    paper:        L = (1 - a) CE(z, y) + a T^2 KL(softmax(z_T / T) || softmax(z / T)),   a = 0.9, T = 4
    okddip_code:  L = CE(z, y) + a T^2 KL(softmax(z_T / T) + 1e-7 || softmax(z / T)),    a = 1, T = 3

The teacher z_T is in evaluation mode and gets no gradient. Several members each learn from it alone.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from torch import Tensor

from codistill.config import KDConfig, MethodConfig, TeacherConfig
from codistill.losses import SOURCE_EPS, cross_entropy, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs

TEACHER_FIELDS = tuple(field.name for field in dataclasses.fields(TeacherConfig))


class KD(Method):
    """Distillation from a fixed teacher.

    Args:
        num_peers: Members.
        options: The fields of `KDConfig` but the teacher; defaults of None are the variant's, above.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(1, 8, 10), [], teacher_logits_BC=torch.zeros(8, 10))
    >>> KD()(outputs, torch.arange(8))["loss"].item()  # 0.1 log 10
    0.2302...
    """

    name = "kd"
    citation = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network. 2015"

    @takes_options(KDConfig, without=TEACHER_FIELDS)
    def __init__(self, num_peers: int = 1, *, options: KDConfig) -> None:
        super().__init__(num_peers)
        paper = options.variant == "paper"
        self.needs = frozenset({"teacher"})
        self.temperature = options.temperature or (4.0 if paper else 3.0)
        self.alpha = (0.9 if paper else 1.0) if options.alpha is None else options.alpha
        self.ce_weight = 1 - self.alpha if paper else 1.0
        self.divergence = Divergence(options, self.temperature, 0.0 if paper else SOURCE_EPS)
        self.needs_full_batch = self.divergence.needs_full_batch

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; the training loop loads the teacher."""
        options = dataclasses.asdict(config)
        return cls(info.num_peers, **{name: options[name] for name in options if name not in TEACHER_FIELDS})

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `outputs.teacher_logits_BC` holds the teacher's logits."""
        self.check(outputs)
        assert outputs.teacher_logits_BC is not None
        log_target_BC = soften(outputs.teacher_logits_BC.detach(), self.temperature)
        ce_P = cross_entropy(outputs.logits_PBC, targets_B)
        distill_P = self.divergence(outputs.logits_PBC, log_target_BC, targets_B)
        terms = combine_terms(ce_P, distill_P, weight * self.alpha, ce_weight=self.ce_weight)
        return terms | {"targets_PBC": log_target_BC.expand_as(outputs.logits_PBC)}
