"""Cosub: co-training of submodels (Touvron et al., CVPR 2023): one network, two draws of its stochastic depth.

A batch runs twice through the network in one forward. Drop path (or dropout) draws for every row, so the two outputs
z_1 and z_2 of an image are those of two submodels, and each learns from the labels and from the other:

    L = 1/4 sum_i [BCE(z_i, Y) + w BCE(z_i, sg sigmoid(z_j))],   j the other one,   w = 1

BCE is the binary cross-entropy of logits, mean over batch and classes; Y is the label as C numbers, mixed where images
are mixed. The released code thresholds Y at > 0 under its option --bce-loss (`threshold_labels`). The paper's abstract
speaks of a softmax cross-entropy, `loss="ce"`: CE(z_i, y) and -sum_c sg softmax(z_j)_c log softmax(z_i)_c in place of
the BCEs, mean over the batch.

The submodels are twins (`codistill.peers.TwinPeers`): they share all weights, which count once, and the whole network
is deployed. Every step costs two passes. `own_views` augments the images of the two separately; the source does not.
Shapes: P = 2 twins, B batch, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.config import CosubConfig
from codistill.losses import cross_entropy, soft_cross_entropy
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class Cosub(Method):
    """Two submodels of one network teach each other; see the module's docstring for the equations.

    Args:
        num_peers: 2.
        options: The fields of `CosubConfig`.

    Raises:
        InputError: there are more or fewer twins.

    >>> Cosub()(PeerOutputs(torch.zeros(2, 8, 10), []), torch.arange(8))["loss"].item()  # log 2
    0.693...
    """

    name = "cosub"
    citation = "Touvron et al.: Co-training 2^L Submodels for Visual Recognition. CVPR 2023"

    @takes_options(CosubConfig)
    def __init__(self, num_peers: int = 2, *, options: CosubConfig) -> None:
        super().__init__(num_peers)
        if num_peers != 2:
            raise InputError(f"--peers is {num_peers}; cosub is defined for 2 twins")
        self.needs = frozenset({"views"} if options.own_views else ())
        self.loss, self.threshold_labels, self.weight = options.loss, options.threshold_labels, options.weight

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `ce_P` is the loss by the labels, `distill_P` that by the other twin."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        other_PBC = z_PBC.detach().flip(0)
        if self.loss == "ce":
            ce_P = cross_entropy(z_PBC, targets_B)
            distill_P = soft_cross_entropy(z_PBC, other_PBC.log_softmax(-1), 1.0)
        else:
            ce_P = binary_cross_entropy(z_PBC, self._label_rows(z_PBC, targets_B))
            distill_P = binary_cross_entropy(z_PBC, other_PBC.sigmoid())
        return combine_terms(ce_P, distill_P, 0.25 * weight * self.weight, ce_weight=0.25)

    def _label_rows(self, z_PBC: Tensor, targets_B: Tensor) -> Tensor:
        """Return the labels as numbers for every class, `B x C`."""
        if targets_B.dim() == 1:
            classes_C = torch.arange(z_PBC.shape[-1], device=z_PBC.device)  # F.one_hot waits for the device
            return (targets_B.unsqueeze(-1) == classes_C).to(z_PBC.dtype)
        return (targets_B > 0).to(z_PBC.dtype) if self.threshold_labels else targets_B


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy, mean over batch and classes: `... x B x C` twice -> `...`; targets broadcast.

    >>> binary_cross_entropy(torch.zeros(2, 3, 4), torch.zeros(3, 4))
    tensor([0.6931, 0.6931])
    """
    targets = targets.to(logits.dtype).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((-2, -1))
