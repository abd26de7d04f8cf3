"""Codistillation (Anil et al., ICLR 2018): networks learn from each other's stale predictions.

    L_i = CE(z_i, y) + w(e) T^2 softCE(z_i; q_i),   q_i = 1/(P-1) sum_{j != i} softmax(z_j^stale / T),   T = 1
    theta^stale <- theta at the start and after every k steps
    w(e) = 0 in the epochs of the burn-in, 1 afterwards

softCE(z; q) = -sum_c q_c log softmax(z / T)_c: its gradient is that of KL(q || softmax(z / T)). The targets are means
of *probabilities*; they are constants.

`partition="same"` (the default): all networks see the same images, as in the mode "equalized" of Preferred Networks'
code, but the predictions stay stale. `partition="disjoint"`, as in the paper and by default in that code: each network
has its own part of the data and runs the others' snapshots on it, so z_j^stale is computed on the images of network i,
and the labels y are those of network i.

Where the sources differ: that code copies parameters only and never puts the copies in evaluation mode, so they
normalize by the batch: so do the snapshots here in training. Their running statistics are copied too, but not used in
training. Its loss by default is KL(own || other), `divergence="reverse_kl"`.
Cost: one forward without gradient for each network and step (disjoint: for each pair of networks, P (P - 1)), also
during the burn-in. Several processes exchange the snapshots' weights when these are taken, and no outputs.
Shapes: P peers, Q = P - 1 others, B batch, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codistill.config import CodistillationConfig
from codistill.losses import cross_entropy, soft_cross_entropy, soften
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs


class Codistillation(Method):
    """Learning from snapshots of the other peers; see the module's docstring for the equations.

    Args:
        num_peers: Networks P, at least 2.
        options: The fields of `CodistillationConfig`; the default burn-in is 120 epochs, 0.4 of 300.

    >>> snapshots = torch.zeros(2, 1, 10)
    >>> outputs = PeerOutputs(torch.zeros(2, 1, 10), [], ema_logits_PBC=snapshots)
    >>> Codistillation(num_peers=2)(outputs, torch.tensor([3]))["loss_P"]
    tensor([4.6052, 4.6052])
    """

    name = "codistillation"
    citation = "Anil et al.: Large Scale Distributed Neural Network Training through Online Distillation. ICLR 2018"
    exchanges_snapshots = True

    @takes_options(CodistillationConfig)
    def __init__(self, num_peers: int, options: CodistillationConfig) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"ema"} | ({"views", "partition"} if options.partition == "disjoint" else set()))
        self.interval, self.interval_unit = options.interval, options.interval_unit
        self.burn_in_epochs = options.burn_in()
        self.temperature, self.weight = options.temperature, options.weight
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch

    def weight_at(self, epoch: float) -> float:
        """Return 0 during the burn-in, 1 afterwards."""
        return float(epoch >= self.burn_in_epochs)

    def snapshot_interval(self, steps_per_epoch: int) -> int:
        """Return the steps from one snapshot to the next."""
        return self.interval * (steps_per_epoch if self.interval_unit == "epochs" else 1)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `targets_PBC` is for inspection.

        Args:
            outputs: With the snapshots' logits in `ema_logits_PBC`; disjoint: the others' in `others_logits_QPBC`.
            targets_B: Labels `B` or `B x C`; disjoint: those of every peer's images, `P x B` or `P x B x C`.
            weight: `weight_at(epoch)`.
        """
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        if outputs.others_logits_QPBC is not None:
            log_others_QPBC = soften(outputs.others_logits_QPBC.detach(), self.temperature)
            log_target_PBC = log_others_QPBC.logsumexp(0) - math.log(len(log_others_QPBC))
        else:
            assert outputs.ema_logits_PBC is not None
            log_target_PBC = others_log_mean(soften(outputs.ema_logits_PBC.detach(), self.temperature))
        if self.divergence.is_plain_kl:
            distill_P = soft_cross_entropy(z_PBC, log_target_PBC, self.temperature)
        else:
            distill_P = self.divergence(z_PBC, log_target_PBC, targets_B)
        return combine_terms(
            cross_entropy(z_PBC, targets_B), distill_P, weight * self.weight, targets_PBC=log_target_PBC
        )


def others_log_mean(log_probs_PBC: Tensor) -> Tensor:
    """Return log mean_{j != i} p_j for every peer i, `P x B x C`; the time grows with P^2.

    >>> others_log_mean(torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()).exp()
    tensor([[[0.2500, 0.7500]],
    <BLANKLINE>
            [[0.5000, 0.5000]]])
    """
    num_peers = len(log_probs_PBC)
    others = [torch.cat((log_probs_PBC[:i], log_probs_PBC[i + 1 :])).logsumexp(0) for i in range(num_peers)]
    return torch.stack(others) - math.log(num_peers - 1)
