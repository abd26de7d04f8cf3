"""SwitOKD: switchable online distillation (Qian et al., ECCV 2022): a teacher that is too far ahead waits.

A teacher t, the larger network, and a student s learn from each other. With one-hot labels Y, and at T = 1,

    a = mean_b ||softmax(z_s) - Y||_1,   b = mean_b ||softmax(z_t) - Y||_1
    G = mean_b ||softmax(z_s) - softmax(z_t)||_1
    expert mode    if G > a - exp(-b / (a + b)) b and b < a:   only s steps
    learning mode  otherwise:                                  both step
    L_i = CE(z_i, y) + sum_{j != i} KL(sg softmax(z_j) || softmax(z_i))

In expert mode t keeps its weights and the optimizer's state: no decay and no momentum moves them. Its forward pass has
updated its BatchNorm statistics, as in the source. Three networks, with `students`:

    1, peers t1 t2 s   each teacher is switched by its own comparison with the student
    2, peers t s1 s2   w_i = 0 in expert mode towards s_i, else 1
                       L_t = max(w_1, w_2) CE(z_t, y) + sum_i w_i KL(sg softmax(z_i) || softmax(z_t))
                       t always steps, so that decay and momentum move it where both w_i are 0, as in the source

The released code for three networks takes the exponential of the second teacher from the first one's distances, and
that of the first student from the second one's. Here each comparison uses its own.

Peers are listed from the largest to the smallest; the last, a student, is deployed. The distances are means over the
whole batch. A paused teacher's loss is reported all the same. `stepping_BP` is 1 where a peer learns, so that its mean
is the part of the steps in which it did.
Shapes: P peers, T teachers, S students, B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.config import SwitOKDConfig
from codistill.losses import cross_entropy, soften
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class SwitOKD(Method):
    """Teachers that wait for their students; see the module's docstring for the equations.

    Args:
        num_peers: 2 or 3, the larger networks first.
        options: The fields of `SwitOKDConfig`.

    Raises:
        InputError: there are more peers, or 2 students of 2 peers.

    >>> outputs = PeerOutputs(torch.zeros(2, 1, 10), [])
    >>> SwitOKD(num_peers=2)(outputs, torch.tensor([3]))["active_P"]
    tensor([True, True])
    """

    name = "switokd"
    citation = "Qian et al.: Switchable Online Knowledge Distillation. ECCV 2022"
    needs_full_batch = True  # who steps is decided by means over the batch

    @takes_options(SwitOKDConfig)
    def __init__(self, num_peers: int, options: SwitOKDConfig) -> None:
        super().__init__(num_peers)
        if num_peers not in (2, 3):
            raise InputError(f"--peers is {num_peers}; switokd is defined for 2 or 3")
        if num_peers == 2 and options.students == 2:
            raise InputError("--method.students 2 leaves no teacher of 2 networks; give --peers 3, or drop it")
        self.num_teachers = num_peers - options.students
        self.pauses_members = options.students == 1
        self.deployed = num_peers - 1
        self.temperature, self.weight = options.temperature, options.weight
        self.divergence = Divergence(options, self.temperature)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `active_P` says who steps, `stepping_BP` is for the metrics."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        learns_TS = self.learns(z_PBC.detach(), targets_B)
        ce_P = cross_entropy(z_PBC, targets_B)
        ce_weight_P = torch.ones_like(ce_P)
        if self.pauses_members:
            distill_P = self.divergence.pairwise(z_PBC, z_PBC.detach(), targets_B)
            active_P = torch.cat((learns_TS[:, 0], learns_TS.new_ones(1)))
            stepping_P = active_P
        else:
            distill_P, ce_weight_P[0] = self._of_two_students(z_PBC, targets_B, learns_TS[0].to(ce_P.dtype))
            active_P = learns_TS.new_ones(self.num_peers)
            stepping_P = torch.cat((learns_TS.any(1), learns_TS.new_ones(2)))
        stepping_BP = stepping_P.to(ce_P.dtype).expand(z_PBC.shape[1], -1)
        terms = combine_terms(ce_P, distill_P, weight * self.weight, stepping_BP=stepping_BP)
        if not self.pauses_members:
            terms["loss_P"] = ce_weight_P * ce_P + weight * self.weight * distill_P
            terms["loss"] = terms["loss_P"].sum()
        return terms | {"active_P": active_P}

    def _of_two_students(self, z_PBC: Tensor, targets_B: Tensor, learns_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distillation terms of a teacher and two students, `P`, and the weight of the teacher's labels."""
        fixed_PBC = z_PBC.detach()
        log_students = soften(fixed_PBC[1:], self.temperature)
        from_students = torch.stack([self.divergence(z_PBC[0], log_students[i], targets_B) for i in range(2)])
        of_students = self.divergence.pairwise(z_PBC, fixed_PBC, targets_B)[1:]
        return torch.cat(((learns_S * from_students).sum().reshape(1), of_students)), learns_S.amax()

    @torch.no_grad()
    def learns(self, z_PBC: Tensor, targets_B: Tensor) -> Tensor:
        """Return whether each teacher is in learning mode towards each student, `teachers x students`."""
        gap, threshold, ahead = self.compare(z_PBC, targets_B)
        return ~((gap > threshold) & ahead)

    @torch.no_grad()
    def compare(self, z_PBC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return G, the threshold a - exp(-b / (a + b)) b, and whether b < a, each `teachers x students`."""
        probs_PBC = z_PBC.softmax(-1)
        if targets_B.dim() == 1:  # ||p - Y||_1 = 2 (1 - p_y)
            own_PB = probs_PBC.gather(-1, targets_B.expand(z_PBC.shape[:2]).unsqueeze(-1)).squeeze(-1)
            to_labels_P = 2 * (1 - own_PB).mean(-1)
        else:
            to_labels_P = (probs_PBC - targets_B).abs().sum(-1).mean(-1)
        teachers, students = probs_PBC[: self.num_teachers], probs_PBC[self.num_teachers :]
        gap_TS = (teachers.unsqueeze(1) - students).abs().sum(-1).mean(-1)
        b_T1, a_S = to_labels_P[: self.num_teachers].unsqueeze(1), to_labels_P[self.num_teachers :]
        threshold_TS = a_S - torch.exp(-b_T1 / (b_T1 + a_S)) * b_T1
        return gap_TS, threshold_TS, b_T1 < a_S
