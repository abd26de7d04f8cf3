"""DML: deep mutual learning (Zhang et al., CVPR 2018): networks learn from each other's predictions.

    paper:        L_i = CE(z_i, y) + 1/(K-1) sum_{j != i} KL(p_j || p_i),   p = softmax(z), T = 1, p_j constant
    target=mean:  L_i = CE(z_i, y) + T^2 KL(softmax(m_i / T) || softmax(z_i / T)),   m_i = mean_{j != i} z_j

Where the sources differ: the authors' code sums over the others, and adds 1e-8 inside its logarithm,
KL = sum p_j log(1e-8 + p_j / (p_i + 1e-8)) (`variant="authors"`); OKDDip's code uses T = 3, adds 1e-7 to the target,
steps all networks at once and detaches nothing (`variant="okddip_code"`). The paper updates one network after the
other, each on fresh predictions (`update="alternating"`). T other than 1 comes with T^2.
Shapes: P peers (K in the paper), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codistill.config import DMLConfig, MethodConfig
from codistill.losses import SOURCE_EPS, cross_entropy, leave_one_out_mean, pairwise_kl, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs

AUTHORS_EPS = 1e-8
"""What the authors' code adds to a probability that it divides by, and to the ratio before the logarithm."""


class DML(Method):
    """Mutual learning; see the module's docstring for the equations.

    Args:
        num_peers: Networks K, at least 2.
        options: The fields of `DMLConfig`; the default temperature is 3 under okddip_code, else 1, the default update
            joint under okddip_code, else alternating.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(2, 8, 10), [])
    >>> DML(num_peers=2)(outputs, torch.arange(8))["loss"].item()  # 2 log 10: equal peers teach each other nothing
    4.605...
    """

    name = "dml"
    citation = "Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning. CVPR 2018"

    @takes_options(DMLConfig)
    def __init__(self, num_peers: int, options: DMLConfig) -> None:
        super().__init__(num_peers)
        okddip_code = options.variant == "okddip_code"
        self.variant, self.target, self.weight = options.variant, options.target, options.weight
        self.temperature = options.temperature or (3.0 if okddip_code else 1.0)
        self.detach, eps = not okddip_code, SOURCE_EPS if okddip_code else 0.0
        self.divergence = Divergence(options, self.temperature, eps)
        self.needs_full_batch = self.divergence.needs_full_batch
        self.update_mode = options.update or ("joint" if okddip_code else "alternating")

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; branches share a trunk, so their update is always joint."""
        options: dict[str, Any] = dataclasses.asdict(config)
        if info.trunk_dim is not None:
            options["update"] = "joint"
        return cls(info.num_peers, **options)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `targets_PBC` (target=mean) is for inspection."""
        self.check(outputs)
        z_PBC = outputs.logits_PBC
        ce_P = cross_entropy(z_PBC, targets_B)
        if self.target == "mean":
            source_PBC = z_PBC.detach() if self.detach else z_PBC
            log_target_PBC = soften(leave_one_out_mean(source_PBC), self.temperature)
            distill_P = self._divergence(z_PBC, log_target_PBC, targets_B)
            return combine_terms(ce_P, distill_P, weight * self.weight, targets_PBC=log_target_PBC)
        if not self.divergence.is_plain_kl:
            source_PBC = z_PBC.detach() if self.detach else z_PBC
            distill_P = self.divergence.pairwise(z_PBC, source_PBC, targets_B)
            if self.variant != "authors":
                distill_P = distill_P / (self.num_peers - 1)
            return combine_terms(ce_P, distill_P, weight * self.weight)
        log_probs_PBC = soften(z_PBC, self.temperature)
        # Softened again, not shared: the sum of both gradients would lose digits before log_softmax's subtraction.
        log_source_PBC = log_probs_PBC.detach() if self.detach else soften(z_PBC, self.temperature)
        if self.variant == "authors":
            distill_P = authors_pairwise_kl(log_probs_PBC.exp(), log_source_PBC.exp()) * self.temperature**2
        else:
            mean_kl_P = pairwise_kl(log_probs_PBC, log_source_PBC, self.divergence.eps) / (self.num_peers - 1)
            distill_P = mean_kl_P * self.temperature**2
        return combine_terms(ce_P, distill_P, weight * self.weight)

    def _divergence(self, student: Tensor, log_target: Tensor, targets_B: Tensor) -> Tensor:
        if self.variant != "authors" or not self.divergence.is_plain_kl:
            return self.divergence(student, log_target, targets_B)
        target, probs = log_target.exp(), (student / self.temperature).softmax(-1)
        pointwise = target * (AUTHORS_EPS + target / (probs + AUTHORS_EPS)).log()
        return pointwise.sum(-1).mean(-1) * self.temperature**2


def authors_pairwise_kl(probs_PBC: Tensor, target_PBC: Tensor) -> Tensor:
    """Return sum_{j != i} sum_c t_j log(e + t_j / (p_i + e)), e = 1e-8, for every peer i, mean over the batch: `P`.

    The logarithm keeps the sum over j from a closed form, so the time grows with P^2. The memory does not: the gradient
    is added up along with the value.

    Args:
        probs_PBC: Probabilities p.
        target_PBC: Probabilities t; they get no gradient.

    >>> probs_PBC = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])
    >>> authors_pairwise_kl(probs_PBC, probs_PBC)
    tensor([0.1308, 0.1438])
    """
    return _AuthorsPairwiseKL.apply(probs_PBC, target_PBC.detach())  # pyrefly: ignore


class _AuthorsPairwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs_PBC: Tensor, target_PBC: Tensor) -> Tensor:
        batch = probs_PBC.shape[1]
        divisor_PBC = probs_PBC + AUTHORS_EPS
        value_PB, gradient_PBC = probs_PBC.new_zeros(probs_PBC.shape[:2]), torch.zeros_like(probs_PBC)
        for shift in range(1, len(probs_PBC)):
            other_PBC = target_PBC.roll(shift, 0)
            ratio_PBC = other_PBC / divisor_PBC
            guarded_PBC = ratio_PBC + AUTHORS_EPS
            gradient_PBC.addcdiv_(ratio_PBC.square_(), guarded_PBC, value=-1 / batch)
            value_PB += other_PBC.mul_(guarded_PBC.log_()).sum(-1)
        ctx.save_for_backward(gradient_PBC)
        return value_PB.mean(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        (gradient_PBC,) = ctx.saved_tensors
        return grad_outputs[0].view(-1, 1, 1) * gradient_PBC, None
