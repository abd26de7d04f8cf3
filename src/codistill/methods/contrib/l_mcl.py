"""L-MCL: layer-wise mutual contrastive learning (Yang et al., TPAMI 2023), on exits of the networks.

Network p has S heads: its exits and, as the last, its own head. Each head has features f_{p,s}, logits z_{p,s} and an
embedding of its own, v = l2norm(W2 relu(W1 f + b1) + b2). For two heads a, c of different networks, rows b, k of the
batch, and every row weighted by w_ac[b], where T = 3 and KL_w(S <- R) = T^2 mean_b w[b] KL(softmax(R[b] / T) ||
softmax(S[b] / T)) with the target R constant:

    S_ac[b, k] = v_a[b] . v_c[k] / tau,   tau = 0.1,   pos_b = {k != b: y_k = y_b}
    nce_w(S)  = -mean_b w[b] / |pos_b| sum_{k in pos_b} [S[b, k] - log sum_{k != b} exp S[b, k]]
    VCL       = nce_w(S_aa) + nce_w(S_cc)                   ICL     = nce_w(S_ac) + nce_w(S_ca)
    softVCL   = KL_w(S_aa <- S_cc) + KL_w(S_cc <- S_aa)     softICL = KL_w(S_ac <- S_ca) + KL_w(S_ca <- S_ac)
    g_p = softmax(V2 relu(V1 [f_{p,1}; ..; f_{p,S}]))       a_p = sum_s g_{p,s} z_{p,s}    what the network's heads say
    L = sum_{p,s} CE(z_{p,s}, y) + sum_p CE(a_p, y) + sum_p sum_q KLT(z_{p,S} <- sg a_q)
        + sum_(a, c) [0.1 VCL + softVCL + 0.1 ICL + softICL]

q includes p, KLT is the divergence of logits at T = 3, and the last sum goes over ordered pairs of heads of different
networks, so that each pair counts twice, as in the source. Rows without a positive are left out of nce (our choice).

match="fixed": w = 1/2, what the learned weights are near at the start. match="learned":
w_ac[b] = sigmoid(cos(M_a f_a[b], M_c f_c[b])), whose maps M are learned after the step on every 50th batch (see
`codistill.methods.contrib.match_learning`); w has no gradient in the step itself.

The source has two networks; more are our choice. Heads, aggregator and M are the method's, and are not deployed.
For the metrics: `gate_BPS`, the aggregators' weights, and each network's parts of the sum over pairs, `vcl_BP`,
`soft_vcl_BP`, `icl_BP` and `soft_icl_BP`, the same for every image; of learned matches also w, `match_BHH`.
Shapes: P networks, S heads of each, H = P S heads, B batch, C classes, D features, E numbers of an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from codistill.config import LMCLConfig, MethodConfig
from codistill.losses import cross_entropy, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.contrib.match_learning import MatchMaps, match_gradients
from codistill.methods.contrib.mcl import PARTS, embedding_head, info_nce_rows
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs, Peers, Views
from codistill.utils import InputError


class LMCL(Method):
    """Mutual contrastive learning between the heads of networks; see the module's docstring for the equations.

    Args:
        num_peers: Networks P, at least 2.
        feature_dims: Width of each network's features.
        exit_dims: Widths of every network's exits (`Peers.exit_dims`).
        num_classes: Classes C.
        options: The fields of `LMCLConfig`.

    Raises:
        InputError: a network has another number of exits.

    >>> outputs = PeerOutputs(torch.zeros(2, 8, 10), [torch.ones(8, 16)] * 2, exits=[[torch.ones(8, 16)]] * 2)
    >>> method = LMCL(num_peers=2, feature_dims=(16, 16), exit_dims=[(16,), (16,)], num_classes=10, exits=1)
    >>> method(outputs, torch.arange(8) // 2)["gate_BPS"].shape
    torch.Size([8, 2, 2])
    """

    name = "l_mcl"
    citation = (
        "Yang, An, Zhou, Zhuang, Xu, Zhang: Online Knowledge Distillation via Mutual Contrastive Learning for Visual "
        "Recognition. TPAMI 2023"
    )
    needs_full_batch = True  # all images of a batch are compared

    @takes_options(LMCLConfig)
    def __init__(
        self,
        num_peers: int,
        feature_dims: Sequence[int],
        exit_dims: Sequence[Sequence[int]],
        num_classes: int,
        options: LMCLConfig,
    ) -> None:
        super().__init__(num_peers)
        for widths in exit_dims:
            if len(widths) != options.exits:
                raise InputError(
                    f"l_mcl learns at {options.exits} exits of each network, and a network has {len(widths)}; build "
                    f"the peers with exits={options.exits}, or the method with exits={len(widths)}"
                )
        self.needs = frozenset({"features", "exits"})
        self.tau, self.temperature = options.tau, options.temperature
        self.weights = [getattr(options, f"{name}_weight") for name in PARTS]
        self.divergence = Divergence(options, self.temperature)
        self.num_heads = options.exits + 1
        widths_of_heads = [[*exits, width] for exits, width in zip(exit_dims, feature_dims, strict=True)]
        self.classifiers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, num_classes) for width in widths) for widths in exit_dims
        )
        self.embeddings = nn.ModuleList(
            embedding_head(width, options.embedding_dim) for widths in widths_of_heads for width in widths
        )
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(sum(w), w[-1]), nn.ReLU(inplace=True), nn.Linear(w[-1], len(w)))
            for w in widths_of_heads
        )
        self.matches = None
        if options.match == "learned":
            self.matches = MatchMaps([width for widths in widths_of_heads for width in widths], options.match_dim)
            self.inner_interval = options.match_interval
        group_H = torch.arange(num_peers).repeat_interleave(self.num_heads)
        self.differ_HH: Tensor
        self.register_buffer("differ_HH", (group_H.unsqueeze(1) != group_H).float(), persistent=False)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; the widths of exits and features may differ."""
        return cls(info.num_peers, info.feature_dims, info.exit_dims, info.num_classes, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms.

        Raises:
            InputError: labels are soft, so that it is open which images are of one class.
        """
        self.check(outputs)
        if targets_B.is_floating_point():
            raise InputError("l_mcl compares images of one class: give one hard label per image")
        z_PSBC = self.classify(outputs)
        gate_PBS = self.weigh_heads(outputs)
        aggregated_PBC = torch.einsum("pbs,psbc->pbc", gate_PBS, z_PSBC)
        ce_P = cross_entropy(z_PSBC, targets_B).sum(1) + cross_entropy(aggregated_PBC, targets_B)
        log_targets_QBC = soften(aggregated_PBC.detach(), self.temperature)
        distill_P = torch.stack([self.divergence(z_PSBC[:, -1], log_q, targets_B) for log_q in log_targets_QBC]).sum(0)
        match_HHB = self.match([f.detach() for f in self.features_of_heads(outputs)])
        parts_PK = self.contrast(outputs, targets_B, match_HHB)
        distill_P = distill_P + self._weigh_parts(parts_PK)
        parts = {f"{name}_BP": part_P.detach().expand(len(targets_B), -1) for name, part_P in zip(PARTS, parts_PK.T)}
        if self.matches is not None:
            parts["match_BHH"] = match_HHB.permute(2, 0, 1)
        return combine_terms(ce_P, distill_P, weight, gate_BPS=gate_PBS.transpose(0, 1)) | parts

    def classify(self, outputs: PeerOutputs) -> Tensor:
        """Return the logits of all heads, a network's own head the last, `P x S x B x C`."""
        return torch.stack(
            [
                torch.stack([*(head(f) for head, f in zip(heads, exits)), z_BC])  # pyrefly: ignore
                for heads, exits, z_BC in zip(self.classifiers, outputs.exits, outputs.logits_PBC)
            ]
        )

    def weigh_heads(self, outputs: PeerOutputs) -> Tensor:
        """Return the aggregators' weights of a network's heads, g, `P x B x S`."""
        joined = [torch.cat([*exits, f], 1) for exits, f in zip(outputs.exits, outputs.features)]
        return torch.stack([gate(f_BD).softmax(-1) for gate, f_BD in zip(self.gates, joined)])

    def match(self, features: Sequence[Tensor], maps: dict[str, Tensor] | None = None) -> Tensor:
        """Return w, `H x H x B`, 0 for heads of one network.

        Args:
            features: `B x D` of every head.
            maps: In place of the learned ones.
        """
        differ_HH1 = self.differ_HH.to(features[0].dtype).unsqueeze(-1)
        if self.matches is None:
            return (0.5 * differ_HH1).expand(-1, -1, len(features[0]))
        return self.matches(features, maps) * differ_HH1

    def run_inner_steps(self, peers: Peers, views: Views, targets_B: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Learn the maps of the matches on a batch, after the step on it; nothing else changes."""
        assert self.matches is not None
        gradients = match_gradients(self, self.matches, peers, views, targets_B, optimizer)
        group = optimizer.param_groups[0]
        self.matches.step(gradients, group["lr"], group["weight_decay"])

    def contrastive_loss(
        self, outputs: PeerOutputs, targets_B: Tensor, maps: dict[str, Tensor], fixed_HBE: Tensor | None = None
    ) -> Tensor:
        """Return the weighted sum over pairs of heads, with the matches that `maps` give, and a gradient through them.

        Args:
            outputs: What is learned.
            targets_B: Class numbers.
            maps: M.
            fixed_HBE: Embeddings that make the targets of the soft parts; by default those of `outputs`, constant.
        """
        match_HHB = self.match(self.features_of_heads(outputs), maps)
        return self._weigh_parts(self.contrast(outputs, targets_B, match_HHB, fixed_HBE)).sum()

    def heads_cross_entropy(self, outputs: PeerOutputs, targets_B: Tensor) -> Tensor:
        """Return sum_{p,s} CE(z_{p,s}, y)."""
        return cross_entropy(self.classify(outputs), targets_B).sum()

    def _weigh_parts(self, parts_PK: Tensor) -> Tensor:
        return torch.stack([w * part_P for w, part_P in zip(self.weights, parts_PK.T)]).sum(0)

    def contrast(
        self, outputs: PeerOutputs, targets_B: Tensor, match_HHB: Tensor, fixed_HBE: Tensor | None = None
    ) -> Tensor:
        """Return each network's VCL, softVCL, ICL and softICL over all pairs of heads, `P x 4`.

        A pair's part belongs to the network whose embeddings are the rows, which for soft parts is the student. The
        other arguments are those of `contrast_embeddings`.
        """
        parts_HK = self.contrast_embeddings(self.embed(outputs), targets_B, match_HHB, fixed_HBE)
        return parts_HK.unflatten(0, (self.num_peers, -1)).sum(1)

    def features_of_heads(self, outputs: PeerOutputs) -> list[Tensor]:
        """Return the features of every head, `B x D` each, a network's own head after its exits."""
        return [f for exits, own in zip(outputs.exits, outputs.features) for f in (*exits, own)]

    def embed(self, outputs: PeerOutputs) -> Tensor:
        """Return the embeddings of every head, of length 1, `H x B x E`."""
        pairs = zip(self.embeddings, self.features_of_heads(outputs))
        return torch.stack([nn.functional.normalize(head(f), dim=-1) for head, f in pairs])

    def contrast_embeddings(
        self, embeddings_HBE: Tensor, targets_B: Tensor, match_HHB: Tensor, fixed_HBE: Tensor | None = None
    ) -> Tensor:
        """Return each head's VCL, softVCL, ICL and softICL, summed over ordered pairs, `H x 4`.

        Args:
            embeddings_HBE: Of every head, of length 1.
            targets_B: Class numbers.
            match_HHB: w, 0 where a pair does not count.
            fixed_HBE: Embeddings that make the targets of the soft parts; by default the same, constant.
        """
        similarity_HHBB = self._compare(embeddings_HBE)
        rows_HHB, positives_B = info_nce_rows(similarity_HHBB, targets_B)
        num_rows = (positives_B > 0).to(match_HHB.dtype).sum().clamp_min(1)
        log_probs_HHBB = soften(similarity_HHBB, self.temperature)
        log_own_HBB = log_probs_HHBB.diagonal().permute(2, 0, 1)
        if fixed_HBE is None:
            fixed_HHBB = log_probs_HHBB.detach()
        else:
            fixed_HHBB = soften(self._compare(fixed_HBE), self.temperature)
        fixed_own_HBB, fixed_HHBB = fixed_HHBB.diagonal().permute(2, 0, 1), fixed_HHBB.transpose(0, 1)
        soft_own_HHB = (fixed_own_HBB.exp() * (fixed_own_HBB - log_own_HBB.unsqueeze(1))).sum(-1)
        soft_cross_HHB = (fixed_HHBB.exp() * (fixed_HHBB - log_probs_HHBB)).sum(-1)
        factor = 2.0 * self.temperature**2 / len(targets_B)  # every pair counts in both orders
        parts = (
            2.0 / num_rows * (match_HHB * rows_HHB.diagonal().T.unsqueeze(1)).sum((1, 2)),
            factor * (match_HHB * soft_own_HHB).sum((1, 2)),
            2.0 / num_rows * (match_HHB * rows_HHB).sum((1, 2)),
            factor * (match_HHB * soft_cross_HHB).sum((1, 2)),
        )
        return torch.stack(parts, 1)

    def _compare(self, embeddings_HBE: Tensor) -> Tensor:
        """Return S of all pairs of heads, `H x H x B x B`."""
        return embeddings_HBE.unsqueeze(1) @ embeddings_HBE.mT.unsqueeze(0) / self.tau
