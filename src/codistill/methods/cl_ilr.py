"""CL-ILR: collaborative learning with intermediate representation sharing (Song & Chai, NeurIPS 2018).

    q_h = softmax(1/(H-1) sum_{j != h} z_j / T)                    leave-one-out mean of logits, constant
    L   = sum_h b CE(z_h, y) + (1 - b) T^2 softCE(z_h; q_h),       b = 0.5, T = 2

softCE(z; q) = -sum_c q_c log softmax(z / T)_c. Heads fork from a shared trunk, flat or as a tree; each fork divides the
gradient that goes into the layers below by its number of children (back-propagation rescaling).

OKDDip's code (`variant="okddip_code"`): CE + w(e) T^2 KL, T = 3, 1e-7 on the target, nothing detached.
Shapes: P peers (H heads), B batch, C classes.
"""

from __future__ import annotations

from torch import Tensor

from codistill.losses import cross_entropy, kl_from_log_probs, leave_one_out_mean, soft_cross_entropy, soften
from codistill.methods.base import Method, Terms, join
from codistill.peers.base import PeerOutputs


class CLILR(Method):
    """Collaborative learning; see the module's docstring for the equations.

    Args:
        num_peers: Heads H, at least 2.
        variant: `paper` or `okddip_code`.
        temperature: T; default the variant's (2, 3).
        beta: b of the paper.
        weight: Weight of the distillation term (okddip_code).
        ramp_epochs: Length of its ramp.
        rescale: Whether forks rescale gradients.
    """

    name = "cl_ilr"
    citation = "Song, Chai: Collaborative Learning for Deep Neural Networks. NeurIPS 2018"

    def __init__(
        self,
        num_peers: int,
        variant: str = "paper",
        temperature: float | None = None,
        beta: float = 0.5,
        weight: float = 1.0,
        ramp_epochs: float | None = None,
        rescale: bool = True,
    ) -> None:
        super().__init__(num_peers)
        self.paper = variant == "paper"
        self.temperature = temperature or (2.0 if self.paper else 3.0)
        self.ce_weight = beta if self.paper else 1.0
        self.weight = 1 - beta if self.paper else weight
        self.ramp_epochs = (0.0 if self.paper else 80.0) if ramp_epochs is None else ramp_epochs
        self.rescale_trunk = rescale

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `targets_PBC` is for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        ce_P = cross_entropy(z_PBC, targets_B)
        if self.paper:
            log_target_PBC = soften(leave_one_out_mean(z_PBC.detach()), self.temperature)
            distill_P = soft_cross_entropy(z_PBC, log_target_PBC, self.temperature)
        else:
            log_target_PBC = soften(leave_one_out_mean(z_PBC), self.temperature)
            distill_P = kl_from_log_probs(z_PBC, log_target_PBC, self.temperature, 1e-7)
        return join(ce_P, distill_P, weight * self.weight, ce_weight=self.ce_weight, targets_PBC=log_target_PBC)
