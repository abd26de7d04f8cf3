"""Independent peers: the baseline of equal cost ("Ind" of OKDDip's tables; one peer is their "Baseline").

L = sum_i CE(z_i, y)
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.config import IndependentConfig
from codistill.losses import cross_entropy
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.peers import PeerOutputs


class Independent(Method):
    """Cross-entropy alone; branches still train their shared trunk jointly.

    Args:
        num_peers: Number of members.
        options: The fields of `IndependentConfig`.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(2, 8, 10), [])
    >>> Independent(num_peers=2)(outputs, torch.arange(8))["loss"].item()  # 2 log 10
    4.605...
    """

    name = "independent"
    citation = "the baseline of equal cost"

    @takes_options(IndependentConfig)
    def __init__(self, num_peers: int, options: IndependentConfig) -> None:
        super().__init__(num_peers)
        self.rescale_trunk = options.rescale

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 0.0) -> Terms:
        """Return `loss = sum_i CE_i`; there is no distillation to weigh."""
        ce_P = cross_entropy(outputs.logits_PBC, targets_B)
        return combine_terms(ce_P, torch.zeros_like(ce_P), 0.0)
