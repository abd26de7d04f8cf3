"""DLB: self-distillation from the last mini-batch (Shen et al., CVPR 2022): one network, its outputs of a step before.

Every image is seen in two steps that follow each other, in two views. With the batches x_i and x_{i-1}, and z' the
logits that the network gave for the first view of x_{i-1} in step i - 1, before that step's update,

    L = CE([z(x_i, view 0); z(x_{i-1}, view 1)], [y_i; y_{i-1}])           mean over the rows of both
      + a KLT(z(x_{i-1}, view 1) <- sg z')                                 T = 3, a = 1

KLT = T^2 KL, mean over x_{i-1}. Both halves run in one forward, so BatchNorm normalizes by both, and every step costs
two passes. The first step has the first half alone. The last batch of an epoch is seen again in the next epoch's first
step; the state is in the checkpoint, so a resumed run continues exactly.

T and a are guesses: the released script has no defaults. Several peers would each learn from themselves alone.
Shapes: P peers (1), B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.config import DLBConfig
from codistill.losses import cross_entropy, soften
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs


class DLB(Method):
    """Self-distillation from the last mini-batch; see the module's docstring for the equations.

    Args:
        num_peers: 1.
        options: The fields of `DLBConfig`.

    >>> from codistill.peers import PreviousOutputs
    >>> previous = PreviousOutputs(torch.zeros(1, 8, 10), torch.zeros(1, 8, 10), torch.arange(8))
    >>> outputs = PeerOutputs(torch.zeros(1, 8, 10), [], previous=previous)
    >>> DLB()(outputs, torch.arange(8))["loss"].item()  # log 10
    2.302...
    """

    name = "dlb"
    citation = "Shen et al.: Self-Distillation from the Last Mini-Batch for Consistency Regularization. CVPR 2022"

    @takes_options(DLBConfig)
    def __init__(self, num_peers: int = 1, *, options: DLBConfig) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"previous"})
        self.temperature, self.weight = options.temperature, options.weight
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; without `outputs.previous`, as in the first step, the cross-entropy alone."""
        self.check(outputs)
        z_PBC, previous = outputs.logits_PBC, outputs.previous
        if previous is None:
            ce_P = cross_entropy(z_PBC, targets_B)
            return combine_terms(ce_P, torch.zeros_like(ce_P), weight * self.weight)
        rows_PBC = torch.cat((z_PBC, previous.logits_PBC), 1)
        ce_P = cross_entropy(rows_PBC, torch.cat((targets_B, previous.targets_B)))
        log_target_PBC = soften(previous.old_logits_PBC.detach(), self.temperature)
        distill_P = self.divergence(previous.logits_PBC, log_target_PBC, previous.targets_B)
        return combine_terms(ce_P, distill_P, weight * self.weight)
