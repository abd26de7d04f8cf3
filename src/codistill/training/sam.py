"""Sharpness-aware minimization (SAM; Foret et al., ICLR 2021): gradients at the nearby weights with the highest loss.

    e_p = rho g_p / ||g_p||,  g_p = the gradient by network p's weights theta_p        step on the gradient at theta + e

Each network is one minimization of its own, so its gradient has its own norm; branches share a trunk and have one norm
together. All members are moved at once, the targets that they give each other too; a method's own parameters are not
moved. As in the usual code, BatchNorm records the statistics of the first forward alone. A step costs two forwards and
two backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from codistill.config import Config
from codistill.methods import Method
from codistill.peers import BranchPeers, Peers, frozen_batchnorm_stats
from codistill.training.run import Run
from codistill.utils import InputError

Terms = dict[str, Tensor]


def check_sam(config: Config, method: Method) -> None:
    """Refuse `--sam-rho` for a method whose step cannot be computed twice.

    Raises:
        InputError: see above.
    """
    if not config.sam_rho:
        return
    reason = None
    if method.update_mode == "alternating":
        reason = "updates one member after the other, so what it would move is out of date at once"
    elif method.pauses_members:
        reason = "decides in every forward who steps, and the two forwards of a step could disagree"
    elif method.remembers_batches or "previous" in method.needs:
        reason = "keeps what it computes of a batch for the next one, and a second forward would replace it"
    if reason is not None:
        raise InputError(f"--sam-rho: {method.name} {reason}, as it is configured here; drop --sam-rho")


def compute_sam_gradients(run: Run, compute: Callable[[], tuple[Terms, Tensor]]) -> tuple[Terms, Tensor]:
    """Leave the gradients at the moved weights in the parameters; the weights themselves stay.

    With `--accumulate` the move is along the gradient of the whole batch, as on a mesh. Where the first gradient is not
    finite, the second is not either, so the guard sees it.

    Args:
        run: What is trained.
        compute: Leaves the gradients at the present weights in the parameters, and returns the batch's terms and hits.

    Returns:
        The terms and hits at the weights as they are, before they are moved.
    """
    (optimizer,) = run.optimizers
    terms, hits_P = compute()
    with moved_uphill(run.peers.local, run.config.sam_rho), frozen_batchnorm_stats(run.peers):
        optimizer.zero_grad(set_to_none=True)
        compute()
    return terms, hits_P


@contextmanager
def moved_uphill(peers: Peers, rho: float) -> Iterator[None]:
    """Move every network's weights by `rho` along its gradient within the context; costs a copy of the weights.

    Args:
        peers: Members with gradients, all in this process.
        rho: Length of the move, in the L2 norm over a network's weights.
    """
    parts: list[nn.Module] = [peers] if isinstance(peers, BranchPeers) else [*peers.members]
    moved: list[Tensor] = []
    steps: list[Tensor] = []
    for part in parts:
        parameters = [p for p in part.parameters() if p.requires_grad and p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            continue
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        moved += parameters
        steps += torch._foreach_mul(gradients, rho / (norm + 1e-12))
    with torch.no_grad():
        before = [p.clone() for p in moved]
        torch._foreach_add_(moved, steps)
    yield
    with torch.no_grad():
        torch._foreach_copy_(moved, before)
