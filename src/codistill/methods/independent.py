"""Independent peers: the baseline of equal cost ("Ind" of OKDDip's tables; one peer is their "Baseline").

L = sum_i CE(z_i, y)
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.losses import cross_entropy
from codistill.methods.base import Method, Terms, join
from codistill.peers.base import PeerOutputs


class Independent(Method):
    """Cross-entropy alone; branches still share (and so jointly train) their trunk.

    Args:
        num_peers: Number of members.
        rescale: Divide the gradient that enters the trunk by the number of branches.
    """

    name = "independent"
    citation = "the baseline of equal cost"

    def __init__(self, num_peers: int, rescale: bool = False) -> None:
        super().__init__(num_peers)
        self.rescale_trunk = rescale

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 0.0) -> Terms:
        """Return `loss = sum_i CE_i`; there is no distillation to weigh."""
        ce_P = cross_entropy(outputs.logits_PBC, targets_B)
        return join(ce_P, torch.zeros_like(ce_P), 0.0)
