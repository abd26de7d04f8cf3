"""KDCL: online distillation via collaborative learning (Guo et al., CVPR 2020): one teacher made of all networks.

    L = sum_i CE(z_i, y) + l sum_i T^2 KL(sg softmax(z_t / T) || softmax(z_i / T)),   T = 2, l = 1

    naive     z_t = z_k, k = argmin_i CE(z_i, y)                       per sample
    linear    z_t = sum_i a_i z_i, a = argmin CE(sum_i a_i z_i, y)     a on the simplex, per sample (or per batch)
    minlogit  z_t[c] = min_i (z_i[c] - z_i[y])                         per sample
    general   f_t = sum_i w_i f_i, w = argmin w' C w, sum w = 1,       once an epoch, on a holdout:
              C_ij = E[(f_i - t) . (f_j - t)]                          f softmax outputs, t one-hot labels

T and l are known from notes on the paper, for CIFAR. Each network gets its own view of every image (invariant
collaborative learning), and all learn one target. The paper defines the error of `general` on the outputs, its slides
weigh logits: `mix` selects what the teacher mixes. Networks may differ in architecture and size.
Shapes: P peers, B batch, C classes, N holdout samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.config import KDCLConfig
from codistill.losses import cross_entropy, mix_log_probs, mix_logits, soften
from codistill.methods.base import Method, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.methods.simplex import best_mixture, quadratic_on_simplex
from codistill.peers import PeerOutputs
from codistill.utils import InputError, accumulation_dtype


class KDCL(Method):
    """All networks learn from one teacher made of their logits; see the module's docstring.

    Args:
        num_peers: Networks, at least 2.
        options: The fields of `KDCLConfig`.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(2, 8, 10), [])
    >>> KDCL(num_peers=2, target="naive")(outputs, torch.arange(8))["weights_BP"][0]
    tensor([1., 0.])
    """

    name = "kdcl"
    citation = "Guo et al.: Online Knowledge Distillation via Collaborative Learning. CVPR 2020"

    @takes_options(KDCLConfig)
    def __init__(self, num_peers: int, options: KDCLConfig) -> None:
        super().__init__(num_peers)
        conditions = {"views": options.own_views, "holdout": options.needs_holdout()}
        self.needs = frozenset(need for need, condition in conditions.items() if condition)
        self.target, self.temperature, self.weight = options.target, options.temperature, options.weight
        self.granularity, self.mix = options.granularity, options.mix
        self.divergence = Divergence(options, self.temperature)
        one_mixture = self.target == "linear" and self.granularity == "batch"
        self.needs_full_batch = one_mixture or self.divergence.needs_full_batch
        self.holdout_fraction = options.holdout_fraction if options.needs_holdout() else 0.0
        self.weights_P: Tensor
        if self.target == "general":  # uniform until the first update on the holdout
            self.register_buffer("weights_P", torch.full((num_peers,), 1.0 / num_peers))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `weights_BP` (all but minlogit) and `targets_PBC` are for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        log_target_BC, weights_BP = self.teacher(z_PBC.detach(), targets_B)
        ce_P = cross_entropy(z_PBC, targets_B)
        distill_P = self.divergence(z_PBC, log_target_BC, targets_B)
        terms = combine_terms(ce_P, distill_P, weight * self.weight, weights_BP=weights_BP)
        return terms | {"targets_PBC": log_target_BC.expand_as(z_PBC)}

    @torch.no_grad()
    def teacher(self, z_PBC: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the teacher's softened log-probabilities, `B x C`, and the members' weights, `B x P`, if any."""
        if self.target == "general":
            weights_BP = self.weights_P.to(z_PBC.dtype).expand(z_PBC.shape[1], -1)
            if self.mix == "probs":
                return mix_log_probs(weights_BP.log().unsqueeze(1), z_PBC, self.temperature)[0], weights_BP
            return soften(mix_logits(weights_BP.unsqueeze(1), z_PBC)[0], self.temperature), weights_BP
        if targets_B.dim() > 1:
            raise InputError(
                f"kdcl's {self.target} target reads one hard label per image; give hard labels, or target general"
            )
        label_logits_PB1 = z_PBC.gather(-1, targets_B.expand(z_PBC.shape[:2]).unsqueeze(-1))
        if self.target == "minlogit":
            return soften((z_PBC - label_logits_PB1).min(0).values, self.temperature), None
        if self.target == "naive":
            best_B = (z_PBC.logsumexp(-1) - label_logits_PB1.squeeze(-1)).argmin(0)
            weights_BP = torch.nn.functional.one_hot(best_B, self.num_peers).to(z_PBC.dtype)
        else:
            weights_BP = self._linear_weights(z_PBC - label_logits_PB1)
        return soften(mix_logits(weights_BP.unsqueeze(1), z_PBC)[0], self.temperature), weights_BP

    def _linear_weights(self, margins_PBC: Tensor) -> Tensor:
        """Return argmin_a CE(sum_i a_i z_i, y) for each sample, or one for the batch, as `B x P`."""
        margins_BPC = margins_PBC.transpose(0, 1)
        if self.granularity == "sample":
            return best_mixture(margins_BPC.unsqueeze(1)).to(margins_PBC.dtype)
        return best_mixture(margins_BPC.unsqueeze(0)).to(margins_PBC.dtype).expand(margins_PBC.shape[1], -1)

    @torch.no_grad()
    def update_on_holdout(self, holdout_logits_PNC: Tensor, holdout_targets_N: Tensor) -> None:
        """Solve for the weights of `general` on the outputs for the holdout."""
        if self.target != "general":
            return
        probs_PNC = holdout_logits_PNC.to(accumulation_dtype(holdout_logits_PNC.device)).softmax(-1)
        labels_NC = torch.nn.functional.one_hot(holdout_targets_N, probs_PNC.shape[-1]).to(probs_PNC.dtype)
        error_PNC = probs_PNC - labels_NC
        covariance_PP = torch.einsum("inc,jnc->ij", error_PNC, error_PNC) / len(holdout_targets_N)
        self.weights_P.copy_(quadratic_on_simplex(covariance_PP))
