"""Keeps weights good when a loss stops being finite, without the host waiting for the device in a step.

Each step raises a flag on the device if the loss or a gradient is not finite. A raised flag makes the fused optimiser
skip its update, that step's and all later ones, until the host looks. BatchNorm's running statistics are put back to
those of the last look. With a limit, so many such steps are passed over: the flag goes down again at the step's end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from codistill.utils.device import accumulation_dtype

if TYPE_CHECKING:
    from codistill.distributed.mesh import Mesh


class FiniteGuard:
    """Watches losses and gradients.

    Args:
        modules: Their buffers are kept safe.
        optimizers: Fused ones; they are given the flag as `found_inf`, the protocol of gradient scaling.
        device: Where the flag lives.
        mesh: The place among several processes, which must raise the flag together.
        limit: Number of bad steps that are skipped before the flag stays up.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        mesh: Mesh | None = None,
        limit: int = 0,
    ) -> None:
        self.mesh, self.limit = mesh, limit
        self.ignored = device.type not in ("cpu", "cuda") and any(_ignores_flag(o, device) for o in optimizers)
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        for optimizer in optimizers:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.parameters = [p for group in groups for p in group["params"]]
        self.buffers = [b for m in modules for b in m.buffers()]
        self.kept = [b.clone() for b in self.buffers]
        self.names: list[str] = []
        self.terms: Tensor | None = None
        self.steps_good = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Bad steps passed over, in the whole run."""
        self.bad = self.flag > 0
        """Whether the last step was bad."""
        self.told = 0
        self.steps_before = 0
        """Steps done before this process took over; the caller sets it."""

    def watch(self, terms: dict[str, Tensor]) -> None:
        """Raise the flag if this step's loss or gradients are not finite, and keep the terms of the first bad step."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).sum() if gradients else self.flag
        loss, ce_P, distill_P = terms["loss"].detach(), terms["ce_P"], terms["distill_P"]
        now = torch.cat((loss.reshape(1), norm.reshape(1), ce_P, distill_P)).to(accumulation_dtype(loss.device))
        if self.terms is None:
            members = range(len(ce_P))
            self.names = ["loss", "gradient norm", *(f"ce[{p}]" for p in members), *(f"distill[{p}]" for p in members)]
            self.terms = now
        self.terms = torch.where(self.flag > 0, self.terms, now)
        bad = ~now[:2].isfinite().all()
        self.flag.copy_(torch.maximum(self.flag, bad.to(self.flag.dtype)))
        if self.mesh is not None:
            self.mesh.all_reduce_flag(self.flag)

    def lets_pass(self) -> bool:
        """Say whether the optimiser is to be called: it looks at the flag itself; where it does not, the host must."""
        return not self.ignored or not bool(self.flag)

    def go_on(self, skipped: Tensor | int) -> None:
        """Take over what an earlier part of the run has left: the modules' buffers, the number of steps skipped."""
        self.told = int(skipped)
        self.skipped.fill_(self.told)
        self.take()

    def take(self) -> None:
        """Take the buffers as they are for those that a bad step goes back to."""
        if self.buffers:  # a network without BatchNorm has none
            torch._foreach_copy_(self.kept, self.buffers)

    @contextmanager
    def undoing(self) -> Iterator[None]:
        """Undo what members have done within, if the flag is up in the end: one may have stepped before another failed.

        Costs a copy of the parameters and of the optimisers' numbers about them.
        """
        states = [
            value for optimizer in self.optimizers for held in optimizer.state.values() for value in held.values()
        ]
        changed = [*self.parameters, *states]
        with torch.no_grad():
            before = [x.clone() for x in changed]
        yield
        with torch.no_grad():
            bad = self.flag > 0
            for x, was in zip(changed, before):  # chosen, not blended: a member may have stepped to infinity
                x.copy_(torch.where(bad, was, x))

    def count(self) -> None:
        """Count a step, if it was good or may be skipped."""
        self.bad = self.flag > 0
        if self.limit:
            self.skipped += self.bad
            self.flag *= self.skipped > self.limit
            for buffer, kept in zip(self.buffers, self.kept):
                buffer.copy_(torch.where(self.bad, kept, buffer))
        self.steps_good += self.flag == 0

    def keep(self) -> None:
        """Take the buffers as the step has left them for those that a skipped one goes back to."""
        if self.limit:
            self.take()

    def counted(self, x: Tensor) -> Tensor:
        """Return a figure of the last step as it goes into sums: 0 where the step was bad."""
        return torch.where(self.bad, torch.zeros_like(x), x)

    def passed_over(self) -> Tensor:
        """Return whether the last step was skipped, and is not the one that ends the run."""
        return self.bad & (self.flag == 0)

    def look(self) -> tuple[int, dict[str, float]] | None:
        """Wait for the device; if the flag is up, return the number of good steps and the terms of the bad one."""
        skipped = min(int(self.skipped.item()), self.limit) if self.limit else 0
        if skipped > self.told and (self.mesh is None or self.mesh.rank == 0):
            warnings.warn(f"{skipped} of at most {self.limit} steps skipped: their loss was not finite", stacklevel=2)
        self.told = skipped
        if not self.flag.item():
            self.take()
            return None
        assert self.terms is not None
        self.skipped.fill_(skipped)  # the step that ends the run is not skipped but done again
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)
        if self.mesh is not None:
            self.terms = self.mesh.mean(self.terms)
        return self.steps_before + int(self.steps_good.item()), dict(zip(self.names, self.terms.tolist()))


def _ignores_flag(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Say whether a fused optimiser of this kind steps on this device in spite of the flag (MPS, in torch 2.12)."""
    tried = nn.Parameter(torch.ones(1, device=device))
    tried.grad = torch.ones_like(tried)
    other = type(optimizer)([tried], lr=0.5, fused=True)  # type: ignore[call-arg]
    other.grad_scale, other.found_inf = None, torch.ones((), device=device)  # type: ignore[attr-defined]
    other.step()
    return bool((tried != 1).any())
