"""The divergences by which a student learns from a target, `--method.divergence`.

With s = softmax(z / T) of the student, t the target's probabilities at the same T, and means over the batch:

    kl          T^2 sum_c t_c log(t_c / s_c)                                               Hinton et al., 2015
    reverse_kl  T^2 sum_c s_c log(s_c / t_c)
    js          T^2 1/2 [KL(t || m) + KL(s || m)],  m = (s + t) / 2                        Jensen-Shannon
    mse         mean_c (z'_c - u'_c)^2,  z' = z - mean_c z, u' the same of the target's logits, without T^2
    dkd         T^2 [a KL(b_t || b_s) + b KL(t^ || s^)],  b_t = (t_y, 1 - t_y), t^ = t over the classes but y,
                a = 1, b = 8                                                               Zhao et al., CVPR 2022
    dist        T^2 [b (1 - mean_b rho(s_b, t_b)) + g (1 - mean_c rho(s_c, t_c))],  rho Pearson's correlation, of a
                sample's classes and of a class's samples, b = g = 1                       Huang et al., NeurIPS 2022

Logit standardization (Sun et al., CVPR 2024) replaces the logits of both sides, before T, by
(z - mean_c z) / (std_c z + 1e-7), with C - 1 in the variance.

A target made of several peers' outputs is standardized as a whole. Its logits are then T times its log-probabilities,
which differ from any other logits of it by a constant per sample, and no divergence sees that constant. dkd reads one
hard label per sample. dist correlates over the batch, so processes gather it and `--accumulate` is refused. The 1e-7
that some codes add to the target (`variant`) belongs to kl without standardization. Nothing is detached here.
Shapes: P peers, B batch, C classes; `...` any leading dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from codistill.config import DivergenceConfig
from codistill.losses import kl_from_log_probs, kl_of_log_probs, pairwise_kl, soften
from codistill.utils import InputError

DEFAULT_WEIGHTS = {"dkd": (1.0, 8.0), "dist": (1.0, 1.0)}
"""dkd's a and b (its repository's value for ResNet-32x4), dist's b and g (its paper's)."""


class Divergence:
    """How a student's logits are compared with a target, on the options of a method.

    Args:
        options: `divergence`, `standardize_logits` and `divergence_weights`.
        temperature: T of both sides.
        eps: What kl adds to the target's probabilities (`SOURCE_EPS` in two codes).

    >>> from codistill.config import DMLConfig
    >>> z, target = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    >>> Divergence(DMLConfig(divergence="reverse_kl"), 1.0)(z, target, torch.tensor([1])).item()
    0.1438...
    """

    def __init__(self, options: DivergenceConfig, temperature: float, eps: float = 0.0) -> None:
        self.kind, self.standardize, self.temperature = options.divergence, options.standardize_logits, temperature
        self.is_plain_kl = self.kind == "kl" and not self.standardize
        """Whether it is the divergence of the papers, for which methods have faster forms."""
        self.eps = eps if self.is_plain_kl else 0.0
        self.weights = tuple(options.divergence_weights) or DEFAULT_WEIGHTS.get(self.kind, ())
        self.needs_full_batch = self.kind == "dist"
        """Whether it is not a mean over samples."""

    def __call__(self, student_logits: Tensor, target_log_probs: Tensor, targets_B: Tensor) -> Tensor:
        """Return the divergence, mean over the batch: `... x B x C` twice -> `...`; the leading dimensions broadcast.

        Args:
            student_logits: Logits of the student.
            target_log_probs: Log-probabilities of the target, already softened by T.
            targets_B: Labels, which dkd reads.

        Raises:
            InputError: dkd is given soft labels.
        """
        if self.is_plain_kl:
            return kl_from_log_probs(student_logits, target_log_probs, self.temperature, self.eps)
        student, target = student_logits, target_log_probs * self.temperature
        if self.standardize:
            student, target = standardize_logits(student), standardize_logits(target)
        if self.kind == "mse":
            return centered_mse(student, target)
        log_s, log_t = soften(student, self.temperature), soften(target, self.temperature)
        return self._of_log_probs(log_s, log_t, targets_B) * self.temperature**2

    def _of_log_probs(self, log_s: Tensor, log_t: Tensor, targets_B: Tensor) -> Tensor:
        if self.kind == "kl":
            return kl_of_log_probs(log_s, log_t)
        if self.kind == "reverse_kl":
            return kl_of_log_probs(log_t, log_s)
        if self.kind == "js":
            return jensen_shannon(log_s, log_t)
        if self.kind == "dist":
            return correlation_distance(log_s.exp(), log_t.exp(), *self.weights)
        if targets_B.is_floating_point():
            raise InputError("--method.divergence dkd reads one hard label per image; give hard labels, or another one")
        return decoupled_kl(log_s, log_t, targets_B, *self.weights)

    def pairwise(self, student_PBC: Tensor, target_PBC: Tensor, targets_B: Tensor) -> Tensor:
        """Return sum_{j != i} D(student_i, target_j) for every peer i: logits `P x B x C` twice -> `P`.

        kl costs the same for any number of peers (`losses.pairwise_kl`); the others are computed for each pair.
        """
        if self.kind == "kl":
            if self.standardize:
                student_PBC, target_PBC = standardize_logits(student_PBC), standardize_logits(target_PBC)
            log_s_PBC, log_t_PBC = soften(student_PBC, self.temperature), soften(target_PBC, self.temperature)
            return pairwise_kl(log_s_PBC, log_t_PBC, self.eps) * self.temperature**2
        log_t_PBC = soften(target_PBC, self.temperature)
        shifts = range(1, len(student_PBC))
        return torch.stack([self(student_PBC, log_t_PBC.roll(shift, 0), targets_B) for shift in shifts]).sum(0)


def standardize_logits(logits: Tensor) -> Tensor:
    """Return (z - mean_c z) / (std_c z + 1e-7), with C - 1 in the variance: `... x C`.

    >>> standardize_logits(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.0000,  0.0000,  1.0000])
    """
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def centered_mse(student_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return the mean squared difference of logits less their mean over classes: `... x B x C` twice -> `...`.

    >>> centered_mse(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(1.)
    """
    difference = student_logits - target_logits
    return (difference - difference.mean(-1, keepdim=True)).square().mean((-2, -1))


def jensen_shannon(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return 1/2 [KL(t || m) + KL(s || m)], m = (s + t)/2, of log-probabilities: `... x B x C` twice -> `...`.

    >>> jensen_shannon(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor(0.0338)
    """
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    return (kl_of_log_probs(log_m, log_t) + kl_of_log_probs(log_m, log_s)) / 2


def decoupled_kl(log_s: Tensor, log_t: Tensor, targets_B: Tensor, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Return DKD's a KL(b_t || b_s) + b KL(t^ || s^) of log-probabilities: `... x B x C` twice -> `...`.

    log(1 - p_y) is the logsumexp of the other classes, where the authors' code takes the logarithm of their sum.

    Args:
        log_s: Log-probabilities of the student.
        log_t: Log-probabilities of the target.
        targets_B: Labels y.
        alpha: a, the weight of "y or not y".
        beta: b, the weight of the other classes among themselves.
    """
    others_C = torch.arange(log_s.shape[-1] - 1, device=log_s.device)
    others_BC = others_C + (others_C >= targets_B.unsqueeze(-1))

    def split(log_probs: Tensor) -> tuple[Tensor, Tensor]:
        shape = log_probs.shape[:-1]
        own = log_probs.gather(-1, targets_B.expand(shape).unsqueeze(-1))
        rest = log_probs.gather(-1, others_BC.expand(*shape, -1))
        return torch.cat((own, rest.logsumexp(-1, keepdim=True)), -1), rest.log_softmax(-1)

    (binary_s, rest_s), (binary_t, rest_t) = split(log_s), split(log_t)
    return alpha * kl_of_log_probs(binary_s, binary_t) + beta * kl_of_log_probs(rest_s, rest_t)


def correlation_distance(s: Tensor, t: Tensor, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return DIST's b (1 - mean_b rho(s_b, t_b)) + g (1 - mean_c rho(s_c, t_c)): `... x B x C` twice -> `...`.

    A correlation of constants is 0, as where the batch has one sample.

    Args:
        s: Probabilities of the student.
        t: Probabilities of the target.
        beta: b, the weight of the classes of a sample.
        gamma: g, the weight of the samples of a class.
    """
    between_classes = 1 - _pearson(s, t, -1).mean(-1)
    between_samples = 1 - _pearson(s, t, -2).mean(-1)
    return beta * between_classes + gamma * between_samples


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return the correlation along a dimension; 1e-8 is added to the product of the norms, as in the source."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
