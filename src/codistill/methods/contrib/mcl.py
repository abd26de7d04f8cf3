"""MCL: mutual contrastive learning (Yang et al., AAAI 2022): peers learn from the similarities of a batch's images.

    v_i = l2norm(W2 relu(W1 f_i + b1) + b2)                  an embedding head of each peer, D_i -> 128 -> 128
    S_ij[b, k] = v_i[b] . v_j[k] / tau,   tau = 0.1          pos_b = {k != b: y_k = y_b}
    nce(S)  = -mean_b 1/|pos_b| sum_{k in pos_b} [S[b, k] - log sum_{k != b} exp S[b, k]]
    VCL     = sum_i nce(S_ii)                                ICL     = sum_{i != j} nce(S_ij)
    softVCL = sum_{i != j} KL_rows(S_ii <- sg S_jj)          softICL = sum_{i != j} KL_rows(S_ij <- sg S_ji)
    L = sum_i CE(z_i, y) + 0.1 VCL + softVCL + 0.1 ICL + softICL  [+ logit term]

KL_rows(S <- R) = T^2 mean_b KL(softmax(R[b] / T) || softmax(S[b] / T)), T = 3, over all k, k = b included; VCL and ICL
leave k = b out, so that in ICL the same image in another peer is neither positive nor negative. The logit term, with
m = sg mean_i z_i and KLT the same divergence of logits over classes:

    2 peers   sum_i KLT(z_i <- m)            more   KLT(z_last <- m), and the last peer is the one deployed

The terms compare the images of a batch, so processes gather it. Rows without a positive are left out of nce's mean (our
own choice: the released code divides by |pos_b|; its batches hold 2 images of each of 64 classes, `--sampler pairs:2`).
The heads are the method's, trained by the run's optimizer, and are not deployed. The paper's memory banks for ImageNet
are not offered.

For the metrics: `positives_BP`, an image's number of positives, and each peer's parts, `vcl_BP`, `soft_vcl_BP`,
`icl_BP` and `soft_icl_BP`, the same for every image so that means over an epoch are reported.
Shapes: P peers, B batch, C classes, D features, E numbers of an embedding, K = 4 parts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from codistill.config import MCLConfig, MethodConfig
from codistill.losses import cross_entropy, kl_of_log_probs, pairwise_kl, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs
from codistill.utils import InputError

PARTS = ("vcl", "soft_vcl", "icl", "soft_icl")


class MCL(Method):
    """Mutual contrastive learning; see the module's docstring for the equations.

    Args:
        num_peers: Networks or branches P; one alone learns from its own pairs (VCL).
        feature_dims: Width of each peer's features.
        options: The fields of `MCLConfig`.

    >>> outputs = PeerOutputs(torch.zeros(2, 8, 10), [torch.ones(8, 16)] * 2)
    >>> MCL(num_peers=2, feature_dims=(16, 16))(outputs, torch.arange(8) // 2)["positives_BP"].mean(0)
    tensor([1., 1.])
    """

    name = "mcl"
    citation = "Yang, An, Cai, Xu: Mutual Contrastive Learning for Visual Representation Learning. AAAI 2022"
    needs_full_batch = True  # all images of a batch are compared

    @takes_options(MCLConfig)
    def __init__(self, num_peers: int, feature_dims: Sequence[int], options: MCLConfig) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"features"})
        self.tau, self.temperature = options.tau, options.temperature
        self.weights = [getattr(options, f"{name}_weight") for name in PARTS]
        self.logit_weight = options.logit_weight
        if self.logit_weight and num_peers > 2:
            self.deployed = num_peers - 1
        self.divergence = Divergence(options, self.temperature)
        self.heads = nn.ModuleList(embedding_head(dim, options.embedding_dim) for dim in feature_dims)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method with a head for each peer's width of features."""
        return cls(info.num_peers, info.feature_dims, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms.

        Raises:
            InputError: labels are soft, so that it is open which images are of one class.
        """
        self.check(outputs)
        if targets_B.is_floating_point():
            raise InputError("mcl compares images of one class: give one hard label per image")
        parts_PK, positives_B = self.contrast(self.embed(outputs.features), targets_B)
        distill_P = torch.stack([factor * part_P for factor, part_P in zip(self.weights, parts_PK.T)]).sum(0)
        if self.logit_weight:
            distill_P = distill_P + self.logit_weight * self._logit_term(outputs.logits_PBC, targets_B)
        terms = combine_terms(cross_entropy(outputs.logits_PBC, targets_B), distill_P, weight)
        parts = {f"{name}_BP": part_P.detach().expand(len(targets_B), -1) for name, part_P in zip(PARTS, parts_PK.T)}
        return terms | parts | {"positives_BP": positives_B.unsqueeze(1).expand(-1, self.num_peers)}

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Return the peers' embeddings of length 1, `P x B x E`."""
        return torch.stack([nn.functional.normalize(head(f), dim=-1) for head, f in zip(self.heads, features)])

    def contrast(self, embeddings_PBE: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return each peer's VCL, softVCL, ICL and softICL, `P x 4`, and each image's number of positives, `B`."""
        similarity_PPBB = embeddings_PBE.unsqueeze(1) @ embeddings_PBE.mT.unsqueeze(0) / self.tau
        others_PP = 1 - torch.eye(len(embeddings_PBE), dtype=similarity_PPBB.dtype, device=similarity_PPBB.device)
        nce_PP, positives_B = info_nce(similarity_PPBB, targets_B)
        log_probs_PPBB = soften(similarity_PPBB, self.temperature)
        log_own_PBB = log_probs_PPBB.diagonal().permute(2, 0, 1)
        soft_icl_PP = kl_of_log_probs(log_probs_PPBB, log_probs_PPBB.detach().transpose(0, 1))  # S_ij <- S_ji
        squared = self.temperature**2
        parts = (
            nce_PP.diagonal(),
            pairwise_kl(log_own_PBB, log_own_PBB.detach()) * squared,
            (nce_PP * others_PP).sum(1),
            (soft_icl_PP * others_PP).sum(1) * squared,
        )
        return torch.stack(parts, 1), positives_B

    def _logit_term(self, z_PBC: Tensor, targets_B: Tensor) -> Tensor:
        """Return the divergence of logits from their mean: of both of 2 peers, of the last of more, `P`."""
        log_target_BC = soften(z_PBC.detach().mean(0), self.temperature)
        if self.num_peers == 2:
            return self.divergence(z_PBC, log_target_BC, targets_B)
        of_last = self.divergence(z_PBC[-1], log_target_BC, targets_B)
        return nn.functional.pad(of_last.reshape(1), (self.num_peers - 1, 0))


def embedding_head(feature_dim: int, embedding_dim: int) -> nn.Sequential:
    """Return the two layers from features to an embedding that is not yet of length 1.

    >>> embedding_head(64, 128)(torch.zeros(5, 64)).shape
    torch.Size([5, 128])
    """
    return nn.Sequential(
        nn.Linear(feature_dim, embedding_dim), nn.ReLU(inplace=True), nn.Linear(embedding_dim, embedding_dim)
    )


def info_nce(similarity: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return nce(S) of the module's docstring: `... x B x B` -> `...`, and each row's number of positives, `B`.

    Rows without a positive are left out of the mean; where no row has one it is 0.

    Args:
        similarity: S, divided by tau.
        targets_B: Class numbers.

    >>> info_nce(torch.zeros(3, 3), torch.tensor([7, 7, 2]))  # log 2: one positive of the two other images
    (tensor(0.6931), tensor([1., 1., 0.]))
    """
    of_rows, positives_B = info_nce_rows(similarity, targets_B)
    return of_rows.sum(-1) / (positives_B > 0).sum().clamp_min(1), positives_B


def info_nce_rows(similarity: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's part of nce(S), 0 without a positive: `... x B x B` -> `... x B`, and the positives, `B`.

    Args:
        similarity: S, divided by tau.
        targets_B: Class numbers.

    >>> info_nce_rows(torch.zeros(3, 3), torch.tensor([7, 7, 2]))[0]
    tensor([0.6931, 0.6931, -0.0000])
    """
    itself_BB = torch.eye(len(targets_B), dtype=torch.bool, device=targets_B.device)
    positive_BB = ((targets_B.unsqueeze(1) == targets_B) & ~itself_BB).to(similarity.dtype)
    positives_B = positive_BB.sum(1)
    if len(targets_B) == 1:  # there is no other image
        return similarity.sum(-1) * 0.0, positives_B
    log_total = similarity.masked_fill(itself_BB, -math.inf).logsumexp(-1, keepdim=True)
    return -((similarity - log_total) * positive_BB).sum(-1) / positives_B.clamp_min(1), positives_B
