"""The equations of the papers as pure functions of tensors: no state, no config, no loop.

Shapes: P peers, B batch, C classes, D features; `...` any leading dimensions (peers, usually). Every function works on
logits, in the dtype it is given, and averages over the batch ("batchmean"), never over peers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCE_EPS = 1e-7
"""What the code of ONE and OKDDip adds to every target probability before the logarithm."""


def sigmoid_ramp(epoch: float, length: float) -> float:
    """Return the ramp-up weight exp(-5 (1 - min(e, L)/L)^2) of Laine & Aila (2017), used by ONE, OKDDip and PCL.

    Args:
        epoch: Epochs done, counted from 0.
        length: Length L of the ramp in epochs; 0 means no ramp.

    >>> round(sigmoid_ramp(0, 80), 6), round(sigmoid_ramp(40, 80), 6), sigmoid_ramp(80, 80)
    (0.006738, 0.286505, 1.0)
    """
    if length <= 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(epoch, length) / length) ** 2)


def cross_entropy(logits: Tensor, targets_B: Tensor) -> Tensor:
    """Return the cross-entropy of every leading index: logits `... x B x C`, targets `B` or `B x C` -> `...`.

    Where each leading index has its own samples, the targets have it too: `... x B` or `... x B x C`.

    >>> cross_entropy(torch.zeros(3, 5, 10), torch.arange(5))
    tensor([2.3026, 2.3026, 2.3026])
    """
    log_probs = logits.log_softmax(-1)
    if targets_B.dtype.is_floating_point:
        return -(targets_B * log_probs).sum(-1).mean(-1)
    index = targets_B.expand(logits.shape[:-1]).unsqueeze(-1)
    return -log_probs.gather(-1, index).squeeze(-1).mean(-1)


def kl_from_log_probs(
    student_logits: Tensor, target_log_probs: Tensor, temperature: float = 1.0, eps: float = 0.0
) -> Tensor:
    """Return T^2 KL(target || softmax(student / T)), mean over the batch: `... x B x C` twice -> `...`.

    Neither argument is detached here.

    Args:
        student_logits: Logits of the student.
        target_log_probs: Log-probabilities of the target, already softened by T.
        temperature: T.
        eps: Added to the target's probabilities, which then sum to more than 1 (`SOURCE_EPS` in two codes).

    >>> z_BC = torch.tensor([[0.0, 2.0]])
    >>> kl_from_log_probs(z_BC, soften(z_BC, 2.0), temperature=2.0).item()
    0.0
    """
    return kl_of_log_probs(soften(student_logits, temperature), target_log_probs, eps) * temperature**2


def kl_of_log_probs(student_log_probs: Tensor, target_log_probs: Tensor, eps: float = 0.0) -> Tensor:
    """Return KL(target || student) of log-probabilities, mean over the batch: `... x B x C` twice -> `...`.

    Args:
        student_log_probs: Log-probabilities of the student; not detached here, like the target's.
        target_log_probs: Log-probabilities of the target.
        eps: Added to the target's probabilities, as in `kl_from_log_probs`.

    >>> kl_of_log_probs(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()).item()
    0.1308...
    """
    return kl_of_probs(student_log_probs, *probs_with_eps(target_log_probs, eps))


def kl_of_probs(student_log_probs: Tensor, target: Tensor, target_log_probs: Tensor) -> Tensor:
    """Return KL(target || student), mean over the batch, of a target given both ways: `... x B x C` thrice -> `...`.

    >>> target = torch.tensor([[0.25, 0.75]])
    >>> kl_of_probs(torch.tensor([[0.5, 0.5]]).log(), target, target.log())
    tensor(0.1308)
    """
    return (target * (target_log_probs - student_log_probs)).sum(-1).mean(-1)


def probs_with_eps(log_probs: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities with `eps` added, and their logarithm.

    >>> probs_with_eps(torch.tensor([0.5, 0.5]).log(), 0.25)[0]
    tensor([0.7500, 0.7500])
    """
    probs = log_probs.exp()
    if not eps:
        return probs, log_probs
    probs = probs + eps
    return probs, probs.log()


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T).

    >>> soften(torch.tensor([0.0, 2.0]), temperature=2.0).exp()
    tensor([0.2689, 0.7311])
    """
    return (logits / temperature).log_softmax(-1)


def kl_divergence(student_logits: Tensor, target_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(softmax(target / T) || softmax(student / T)) (Hinton et al., 2015): `... x B x C` twice -> `...`.

    >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 2.0]]), temperature=2.0).item()
    0.4437...
    """
    return kl_from_log_probs(student_logits, soften(target_logits, temperature), temperature)


def pairwise_kl(student_log_probs_PBC: Tensor, target_log_probs_PBC: Tensor, eps: float = 0.0) -> Tensor:
    """Return sum_{j != i} KL(target_j || student_i) for every peer i, mean over the batch: `P x B x C` twice -> `P`.

    Args:
        student_log_probs_PBC: Log-probabilities that the peers learn with; not detached here, like the targets'.
        target_log_probs_PBC: Log-probabilities that the others learn from.
        eps: Added to the targets' probabilities, as in `kl_from_log_probs`.

    >>> log_probs_PBC = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    >>> pairwise_kl(log_probs_PBC, log_probs_PBC)
    tensor([0.1308, 0.1438])
    """
    weights_PP = 1 - torch.eye(
        len(target_log_probs_PBC), dtype=target_log_probs_PBC.dtype, device=target_log_probs_PBC.device
    )
    return weighted_kl(student_log_probs_PBC, target_log_probs_PBC, weights_PP, eps)


def weighted_kl(
    student_log_probs_PBC: Tensor, target_log_probs_QBC: Tensor, weights_PQ: Tensor, eps: float = 0.0
) -> Tensor:
    """Return sum_j w_ij KL(target_j || student_i) for every peer i, mean over the batch, `P`.

    No tensor is larger than the arguments. With t_j the targets' probabilities, M_i = sum_j w_ij t_j and any r,

        sum_j w_ij KL(t_j || s_i) = sum_j w_ij sum_c t_j (log t_j - r) - sum_c M_i (log s_i - r).

    With r = 0 these are entropies and cross-entropies, which cancel where the peers agree. With r = log mean_j t_j both
    sums are then near 0, and the first is at most log Q per target anywhere.

    Args:
        student_log_probs_PBC: Log-probabilities that the peers learn with; not detached here, like the targets'.
        target_log_probs_QBC: Log-probabilities of the targets.
        weights_PQ: Constants w.
        eps: Added to the targets' probabilities, as in `kl_from_log_probs`.

    >>> log_probs_PBC = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    >>> weighted_kl(log_probs_PBC, log_probs_PBC, 1 - torch.eye(2))
    tensor([0.1308, 0.1438])
    """
    target_QBC, target_log_probs_QBC = probs_with_eps(target_log_probs_QBC, eps)
    # A constant: the derivative with respect to r is zero. Where it is clamped every target is 0.
    reference_BC = target_QBC.detach().mean(0).clamp_min(torch.finfo(target_QBC.dtype).tiny).log()
    with torch.autocast(target_QBC.device.type, enabled=False):  # bfloat16 would lose the differences
        # Not the sum of all targets minus t_i, which loses the others' digits where t_i is much larger.
        summed_PBC = (weights_PQ @ target_QBC.flatten(1)).view_as(student_log_probs_PBC)
        to_reference_Q = (target_QBC * (target_log_probs_QBC - reference_BC)).sum(-1).mean(-1)
        return weights_PQ @ to_reference_Q - (summed_PBC * (student_log_probs_PBC - reference_BC)).sum(-1).mean(-1)


def soft_cross_entropy(student_logits: Tensor, target_log_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -T^2 sum_c t_c log softmax(student / T)_c, mean over the batch: its gradient is that of the KL.

    >>> z_BC = torch.zeros(1, 4)
    >>> soft_cross_entropy(z_BC, soften(z_BC, 1.0)).item()  # the entropy of four equal classes, log 4
    1.386...
    """
    return -(target_log_probs.exp() * soften(student_logits, temperature)).sum(-1).mean(-1) * temperature**2


def leave_one_out_mean(logits_PBC: Tensor) -> Tensor:
    """Return mean_{j != i} z_j for every peer i, `P x B x C`.

    >>> leave_one_out_mean(torch.tensor([[[1.0]], [[2.0]], [[6.0]]])).flatten()
    tensor([4.0000, 3.5000, 1.5000])
    """
    return (logits_PBC.sum(0) - logits_PBC) / (len(logits_PBC) - 1)


def attention_log_weights(query_PBD: Tensor, key_PBD: Tensor, mask_self: bool = False) -> Tensor:
    """Return log alpha_ab, alpha_ab = softmax_b(q_a . k_b), as `B x P x P` (OKDDip, eq. 4; unscaled dot products).

    Args:
        query_PBD: Projections q_a of every peer's features.
        key_PBD: Projections k_b.
        mask_self: Exclude b = a.

    >>> h_PBD = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> attention_log_weights(h_PBD, h_PBD).exp()
    tensor([[[0.7311, 0.2689],
             [0.2689, 0.7311]]])
    """
    scores_BPP = torch.einsum("abd,cbd->bac", query_PBD, key_PBD)
    if mask_self:
        diagonal_PP = torch.eye(scores_BPP.shape[-1], dtype=torch.bool, device=scores_BPP.device)
        scores_BPP = scores_BPP.masked_fill(diagonal_PP, -math.inf)
    return scores_BPP.log_softmax(-1)


def mix_logits(weights_BPQ: Tensor, logits_QBC: Tensor) -> Tensor:
    """Return sum_b w_ab z_b for every a: `B x P x Q` and `Q x B x C` -> `P x B x C`.

    >>> mix_logits(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[4.0]], [[8.0]]]))
    tensor([[[7.]]])
    """
    return torch.einsum("bpq,qbc->pbc", weights_BPQ, logits_QBC)


def mix_log_probs(log_weights_BPQ: Tensor, logits_QBC: Tensor, temperature: float) -> Tensor:
    """Return log sum_b w_ab softmax(z_b / T) for every a: `B x P x Q`, `Q x B x C` -> `P x B x C`.

    Probabilities are mixed as in `mix_probs`, so that confident peers do not underflow.

    >>> half_BPQ = torch.full((1, 1, 2), 0.5).log()
    >>> mix_log_probs(half_BPQ, torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]), temperature=1.0).exp()
    tensor([[[0.5000, 0.5000]]])
    """
    return mix_probs(log_weights_BPQ, soften(logits_QBC, temperature))[1]


def mix_probs(log_weights_BPQ: Tensor, log_probs_QBC: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_b w_ab p_b for every a, and its logarithm: `B x P x Q`, `Q x B x C` -> `P x B x C` twice.

    A batched matrix product of the weights and of p_b / max_b p_b, the largest of each sample and class: nothing of
    size P x Q x C is made. A mixture below 1e-38 of that largest (float32; 1e-308 in float64), as where attention
    excludes a confident peer, has the logarithm of this much: finite, where the probability is 0.

    >>> mix_probs(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log())[0]
    tensor([[[0.3750, 0.6250]]])
    """
    top_BC = log_probs_QBC.detach().amax(0)  # a constant: it cancels
    with torch.autocast(log_probs_QBC.device.type, enabled=False):  # bfloat16 would lose the differences
        ratios_BQC = (log_probs_QBC - top_BC).exp().transpose(0, 1)
        mixed_PBC = torch.bmm(log_weights_BPQ.exp(), ratios_BQC).transpose(0, 1)
    return mixed_PBC * top_BC.exp(), mixed_PBC.clamp_min(torch.finfo(mixed_PBC.dtype).tiny).log() + top_BC


class _MixtureKL(torch.autograd.Function):
    """`mixture_kl` with its gradients written out, in a third of the passes over the logits that autograd makes."""

    @staticmethod
    def forward(
        ctx: Any, logits_NBC: Tensor, log_weights_BPQ: Tensor, temperature: float, source_has_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        _, num_students, num_sources = log_weights_BPQ.shape
        with torch.autocast(logits_NBC.device.type, enabled=False):  # bfloat16 would lose the differences
            log_probs_NBC = soften(logits_NBC, temperature)
            log_students_PBC = log_probs_NBC[-num_students:]
            mixtures_PBC, log_mixtures_PBC = mix_probs(log_weights_BPQ, log_probs_NBC[:num_sources])
            kl_P = kl_of_probs(log_students_PBC, mixtures_PBC, log_mixtures_PBC) * temperature**2
        ctx.save_for_backward(log_probs_NBC, log_weights_BPQ, mixtures_PBC, log_mixtures_PBC)
        ctx.temperature, ctx.source_has_gradient = temperature, source_has_gradient
        ctx.mark_non_differentiable(log_mixtures_PBC)
        return kl_P, log_mixtures_PBC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        """Return the gradients of logits and weights.

        With s the students, t the mixtures and D = log t - log s, for one sample and KL without T^2:
        dKL/dz_student = (s - t) / T,  dKL/dw_ab = sum_c p_b (D_a + 1),  dKL/dp_b = sum_a w_ab (D_a + 1), the last
        through softmax(z_b / T), which takes out what all classes have in common, such as the 1.
        """
        log_probs_NBC, log_weights_BPQ, mixtures_PBC, log_mixtures_PBC = ctx.saved_tensors
        batch, num_students, num_sources = log_weights_BPQ.shape
        factor_P11 = (grad_outputs[0] * (ctx.temperature**2 / batch)).view(-1, 1, 1)
        with torch.autocast(log_probs_NBC.device.type, enabled=False):
            probs_NBC = log_probs_NBC.exp()
            to_mixtures_PBC = (log_mixtures_PBC - log_probs_NBC[-num_students:]).mul_(factor_P11)
            weights_BPQ, grad_weights = log_weights_BPQ.exp(), None
            if ctx.needs_input_grad[1]:
                products_BPQ = torch.bmm(to_mixtures_PBC.transpose(0, 1), probs_NBC[:num_sources].permute(1, 2, 0))
                grad_weights = weights_BPQ * (products_BPQ + factor_P11.view(1, -1, 1))
            if not ctx.needs_input_grad[0]:
                return None, grad_weights, None, None
            grad_NBC = torch.zeros_like(probs_NBC)
            torch.sub(probs_NBC[-num_students:], mixtures_PBC, out=grad_NBC[-num_students:])
            grad_NBC[-num_students:].mul_(factor_P11)
            if ctx.source_has_gradient:
                probs_QBC = probs_NBC[:num_sources]
                through_QBC = torch.bmm(weights_BPQ.transpose(1, 2), to_mixtures_PBC.transpose(0, 1)).transpose(0, 1)
                through_QBC = probs_QBC * through_QBC
                # Less its mean first: it is large for confident peers, and the student's part would lose its digits.
                through_QBC.addcmul_(probs_QBC, through_QBC.sum(-1, keepdim=True), value=-1)
                grad_NBC[:num_sources] += through_QBC
        return grad_NBC.div_(ctx.temperature), grad_weights, None, None


def mixture_kl(
    logits_NBC: Tensor, log_weights_BPQ: Tensor, temperature: float = 1.0, detach_sources: bool = False
) -> tuple[Tensor, Tensor]:
    """Return T^2 KL(t_a || softmax(z_a / T)) of members that learn from mixtures of members (OKDDip, eq. 3 and 5).

    The mixture is t_a = sum_b w_ab softmax(z_b / T). Gradients reach the students, the weights and the sources, but
    for those of second order.

    Args:
        logits_NBC: Logits z of all members: the sources are the first Q, the students the last P.
        log_weights_BPQ: log w_ab per sample; may be -inf.
        temperature: T.
        detach_sources: Whether the sources get no gradient; the weights do.

    Returns:
        The divergences, means over the batch, `P`, and log t_a, `P x B x C`, which carries no gradient.

    >>> logits_PBC, half_BPQ = torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]), torch.full((1, 2, 2), 0.5).log()
    >>> mixture_kl(logits_PBC, half_BPQ)[0]
    tensor([0.1201, 0.1201])
    """
    if logits_NBC.dtype in (torch.float16, torch.bfloat16):
        logits_NBC, log_weights_BPQ = logits_NBC.float(), log_weights_BPQ.float()
    return _MixtureKL.apply(logits_NBC, log_weights_BPQ, temperature, not detach_sources)  # pyrefly: ignore


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of softmax(logits), in nats: `... x B x C` -> `...`.

    >>> entropy(torch.zeros(1, 4)).item()  # log 4
    1.386...
    """
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean(-1)


def peer_distance(probs_PBC: Tensor, eps: float = 0.0) -> Tensor:
    """Return the diversity of OKDDip's section 5: the L2 distance of softmaxes, averaged over pairs -> `B`.

    Args:
        probs_PBC: Probabilities at T = 1.
        eps: Added to every difference before the norm (the authors' code adds 1e-6, through `pairwise_distance`).

    Returns:
        One distance per sample; zeros if there is one peer only.

    >>> peer_distance(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    tensor([1.4142])
    """
    num_peers = probs_PBC.shape[0]
    if num_peers < 2:
        return probs_PBC.new_zeros(probs_PBC.shape[1])
    distances = [(probs_PBC[p] - probs_PBC[p + 1 :] + eps).norm(dim=-1) for p in range(num_peers - 1)]
    return torch.cat(distances).mean(0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`; its gradient is multiplied by `factor` (CL's back-propagation rescaling, Song & Chai 2018, eq. 9).

    >>> x = torch.ones(1, requires_grad=True)
    >>> scale_gradient(x, 0.5).backward()
    >>> x.grad
    tensor([0.5000])
    """
    return _ScaleGradient.apply(x, factor)  # pyrefly: ignore


__all__ = [
    "SOURCE_EPS",
    "attention_log_weights",
    "cross_entropy",
    "entropy",
    "kl_divergence",
    "kl_from_log_probs",
    "kl_of_log_probs",
    "kl_of_probs",
    "leave_one_out_mean",
    "mix_log_probs",
    "mix_logits",
    "mix_probs",
    "mixture_kl",
    "pairwise_kl",
    "peer_distance",
    "probs_with_eps",
    "scale_gradient",
    "sigmoid_ramp",
    "soft_cross_entropy",
    "soften",
    "weighted_kl",
]
