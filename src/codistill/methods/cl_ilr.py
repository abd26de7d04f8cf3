"""CL-ILR: collaborative learning with intermediate representation sharing (Song & Chai, NeurIPS 2018).

    q_h = softmax(1/(H-1) sum_{j != h} z_j / T)                    leave-one-out mean of logits, constant
    L   = sum_h b CE(z_h, y) + (1 - b) T^2 softCE(z_h; q_h),       b = 0.5, T = 2

softCE(z; q) = -sum_c q_c log softmax(z / T)_c. Heads fork from a shared trunk, flat or as a tree; each fork divides the
gradient that it passes to the layers below by its number of children (back-propagation rescaling). Whether the paper
has the factor T^2 is doubtful: a public implementation has none (`temperature_squared=False`).

OKDDip's code (`variant="okddip_code"`): CE + w(e) T^2 KL, T = 3, 1e-7 on the target, nothing detached.
Shapes: P peers (H heads), B batch, C classes.
"""

from __future__ import annotations

from torch import Tensor

from codistill.config import CLILRConfig
from codistill.losses import (
    SOURCE_EPS,
    cross_entropy,
    leave_one_out_mean,
    soft_cross_entropy,
    soften,
)
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs


class CLILR(Method):
    """Collaborative learning; see the module's docstring for the equations.

    Args:
        num_peers: Heads H, at least 2.
        options: The fields of `CLILRConfig`; the default temperature is 2 for the paper, 3 for okddip_code, whose
            default ramp is 80 epochs.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(3, 8, 10), [])
    >>> CLILR(num_peers=3)(outputs, torch.arange(8))["ce_P"]
    tensor([2.3026, 2.3026, 2.3026])
    """

    name = "cl_ilr"
    citation = "Song, Chai: Collaborative Learning for Deep Neural Networks. NeurIPS 2018"

    @takes_options(CLILRConfig)
    def __init__(self, num_peers: int, options: CLILRConfig) -> None:
        super().__init__(num_peers)
        self.paper = options.variant == "paper"
        self.temperature = options.temperature or (2.0 if self.paper else 3.0)
        self.ce_weight = options.beta if self.paper else 1.0
        without_square = self.temperature**-2 if self.paper and not options.temperature_squared else 1.0
        self.weight = (1 - options.beta) * without_square if self.paper else options.weight
        self.ramp_epochs = options.ramp_length()
        self.rescale_trunk = options.rescale
        self.divergence = Divergence(options, self.temperature, 0.0 if self.paper else SOURCE_EPS)
        self.needs_full_batch = self.divergence.needs_full_batch

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `targets_PBC` is for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        ce_P = cross_entropy(z_PBC, targets_B)
        source_PBC = z_PBC.detach() if self.paper else z_PBC
        log_target_PBC = soften(leave_one_out_mean(source_PBC), self.temperature)
        if self.paper and self.divergence.is_plain_kl:
            distill_P = soft_cross_entropy(z_PBC, log_target_PBC, self.temperature)
        else:
            distill_P = self.divergence(z_PBC, log_target_PBC, targets_B)
        return combine_terms(
            ce_P, distill_P, weight * self.weight, ce_weight=self.ce_weight, targets_PBC=log_target_PBC
        )
