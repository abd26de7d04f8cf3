"""Two convex problems on the simplex, which KDCL's teachers are the solutions of.

Shapes: G groups (problems solved side by side), N samples a group, P members, C classes.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

ITERATIONS = 36
BARRIER_FIRST, BARRIER_LAST = 1.0, 1e-8
STEP_SIZES = 10


@torch.no_grad()
def best_mixture(margins_GNPC: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Return a = argmin over the simplex of mean_n logsumexp_c(sum_p a_p u_pc), in float64, `G x P`.

    With margins u_p = z_p - z_p[y] this is the mixture of logits with the least cross-entropy (KDCL-Linear). The
    problem is convex; its minimisers need not be unique.

    A barrier method in a fixed number of steps and without a host read: Newton's direction on
    f(a) - mu sum log a, a line search over a fixed ladder of step sizes, and mu falling from 1 to 1e-8. At the end the
    Frank-Wolfe gap is at most P mu (plus what Newton leaves).

    Args:
        margins_GNPC: u; any scale.
        iterations: Newton steps.
    """
    u = margins_GNPC.double()
    groups, _, members, _ = u.shape
    a = u.new_full((groups, members), 1.0 / members)
    fall = (BARRIER_LAST / BARRIER_FIRST) ** (1.0 / (iterations * 0.75))
    ladder = 2.0 ** -torch.arange(STEP_SIZES, dtype=u.dtype, device=u.device)
    mu = BARRIER_FIRST
    for _ in range(iterations):
        gradient, hessian = _derivatives(a, u)
        step = _newton_step(a, gradient, hessian, mu)
        # The longest step that keeps every weight positive, then a ladder below it.
        room = torch.where(step < 0, -a / step.clamp(max=-1e-300), torch.inf).amin(-1).mul(0.99).clamp(max=1.0)
        sizes_SG = ladder.unsqueeze(1) * room
        tries_SGP = a + sizes_SG.unsqueeze(-1) * step
        merit_SG = _value(tries_SGP, u) - mu * tries_SGP.log().sum(-1)
        merit_G = _value(a, u) - mu * a.log().sum(-1)
        best_G = merit_SG.argmin(0)
        chosen = tries_SGP.gather(0, best_G.view(1, -1, 1).expand(1, groups, members))[0]
        better_G = merit_SG.amin(0) < merit_G
        a = torch.where(better_G.unsqueeze(-1), chosen, a)
        a = a / a.sum(-1, keepdim=True)
        mu = max(mu * fall, BARRIER_LAST)
    return a


def _value(a: Tensor, u_GNPC: Tensor) -> Tensor:
    """Return f for `... x G x P` weights."""
    return torch.einsum("...gp,gnpc->...gnc", a, u_GNPC).logsumexp(-1).mean(-1)


def _derivatives(a_GP: Tensor, u_GNPC: Tensor) -> tuple[Tensor, Tensor]:
    """Return f's gradient, `G x P`, and Hessian, `G x P x P`."""
    probs = torch.einsum("gp,gnpc->gnc", a_GP, u_GNPC).softmax(-1)
    mean_GNP = torch.einsum("gnc,gnpc->gnp", probs, u_GNPC)
    centred = (u_GNPC - mean_GNP.unsqueeze(-1)) * probs.sqrt().unsqueeze(2)
    return mean_GNP.mean(1), torch.einsum("gnpc,gnqc->gpq", centred, centred) / u_GNPC.shape[1]


def _newton_step(a_GP: Tensor, gradient_GP: Tensor, hessian_GPP: Tensor, mu: float) -> Tensor:
    """Return Newton's step of the barrier problem, with the weights' sum kept.

    In the scaled variables d = step / a the matrix is a H a + mu I, which stays well conditioned at the boundary.
    """
    scaled = a_GP.unsqueeze(-1) * hessian_GPP * a_GP.unsqueeze(-2)
    scaled = scaled + mu * torch.eye(a_GP.shape[-1], dtype=a_GP.dtype, device=a_GP.device)
    right = torch.stack((mu - a_GP * gradient_GP, a_GP), -1)
    solved = torch.linalg.solve_ex(scaled, right)[0]  # the plain solve would wait for the device
    lagrange = (a_GP * solved[..., 0]).sum(-1) / (a_GP * solved[..., 1]).sum(-1)
    return a_GP * (solved[..., 0] - lagrange.unsqueeze(-1) * solved[..., 1])


@torch.no_grad()
def frank_wolfe_gap(a_GP: Tensor, margins_GNPC: Tensor) -> Tensor:
    """Return max_e f'(a) (a - e) over the simplex's corners e: how far f(a) can be from the minimum; `G`."""
    gradient, _ = _derivatives(a_GP.double(), margins_GNPC.double())
    return (a_GP.double() * gradient).sum(-1) - gradient.amin(-1)


def quadratic_on_simplex(matrix_PP: Tensor) -> Tensor:
    """Return argmin of w' C w over the simplex, float64, `P`.

    The closed form C^-1 1 / (1' C^-1 1) where it lies in the simplex; else the best of the closed forms on fewer members,
    which is exact (a minimiser has some support, and on it the closed form holds). A ridge of 1e-12 of the trace makes
    exchangeable members equal. 2^P - 1 tiny solves at the most, once an epoch.
    """
    matrix = matrix_PP.double().cpu()
    members = len(matrix)
    matrix = matrix + torch.eye(members, dtype=torch.float64) * (1e-12 * matrix.trace().clamp_min(1e-300))
    best, best_value = None, float("inf")
    for size in range(members, 0, -1):
        for support in combinations(range(members), size):
            index = torch.tensor(support)
            solved = torch.linalg.solve(matrix[index][:, index], torch.ones(size, dtype=torch.float64))
            weights = solved / solved.sum()
            if (weights < 0).any():
                continue
            full = torch.zeros(members, dtype=torch.float64).index_copy_(0, index, weights)
            if size == members:
                return full.to(matrix_PP.device)
            value = float(full @ matrix @ full)
            if value < best_value:
                best, best_value = full, value
    assert best is not None, "single members always lie in the simplex"
    return best.to(matrix_PP.device)
