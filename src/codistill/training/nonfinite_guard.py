"""Protects the weights when a loss or gradient is not finite, without a host read in the training step.

Each step sets a flag on the device if the loss or a gradient is not finite. A set flag makes the fused optimizer skip
its update, in that step and all later ones, until the host reads the flag; BatchNorm's running statistics are then
restored to those of the previous read. With a limit above 0, up to so many bad steps are skipped: the flag is cleared
at the step's end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from codistill.distributed import Mesh
from codistill.utils import accumulation_dtype


class FiniteGuard:
    """Detects non-finite losses and gradients.

    Args:
        modules: Modules whose buffers are restored after a bad step.
        optimizers: Fused ones; they get the flag as `found_inf`, the protocol of gradient scaling.
        mesh: The ranks, which set the flag together.
        limit: Number of bad steps that are skipped before the flag stays set.
    """

    def __init__(
        self, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], mesh: Mesh, limit: int = 0
    ) -> None:
        device = mesh.device
        self.mesh, self.limit = mesh, limit
        self.ignored = device.type not in ("cpu", "cuda") and any(_ignores_flag(o, device) for o in optimizers)
        """Whether the optimizers step in spite of the flag, so that the host must read it."""
        self.flag = torch.zeros((), dtype=torch.float32, device=device)
        for optimizer in optimizers:
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]
        self.optimizers = optimizers
        self.parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.buffers = [b for m in modules for b in m.buffers()]
        self.good_buffers = [b.clone() for b in self.buffers]
        self.names: list[str] = []
        self.terms: Tensor | None = None
        """Terms of the first bad step, or of the last step where none was bad."""
        self.steps_good = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Bad steps skipped in the whole run."""
        self.bad = self.flag > 0
        """Whether the last step was bad."""
        self.num_reported = 0
        """Skipped steps that the user was warned of."""
        self.terms_scale = 1
        """Factor of the mean of all ranks' terms: the size of `peer`, where each has those of its own members alone."""
        self.steps_before = 0
        """Steps done before this process continued the run; the caller sets it."""

    def update_flag(self, terms: dict[str, Tensor]) -> None:
        """Set the flag if this step's loss or gradients are not finite, and keep the terms of the first bad step."""
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
        self.mesh.all_reduce_flag(self.flag)

    def should_step(self) -> bool:
        """Return whether to call the optimizer, which reads the flag itself; where it does not, the host reads it."""
        return not self.ignored or not bool(self.flag)

    def restore(self, skipped: Tensor | int) -> None:
        """Continue a run whose modules have been loaded: snapshot their buffers, set the number of skipped steps."""
        self.num_reported = int(skipped)
        self.skipped.fill_(self.num_reported)
        self.snapshot()

    def snapshot(self) -> None:
        """Snapshot the buffers; a bad step restores them."""
        if self.buffers:  # a network without BatchNorm has none
            torch._foreach_copy_(self.good_buffers, self.buffers)

    @contextmanager
    def rollback_if_bad(self) -> Iterator[None]:
        """Roll back all members' updates if any of them was non-finite: one may have stepped before another failed.

        Costs a copy of the parameters and of the optimizers' state.
        """
        states = [value for o in self.optimizers for entry in o.state.values() for value in entry.values()]
        changed = [*self.parameters, *states]
        with torch.no_grad():
            before = [x.clone() for x in changed]
        yield
        with torch.no_grad():
            bad = self.flag > 0
            for x, old in zip(changed, before):  # where, not a product with 0: a member may have stepped to infinity
                x.copy_(torch.where(bad, old, x))

    def advance(self) -> None:
        """End a step: count it if it was good; if it was bad and may be skipped, restore buffers, clear the flag."""
        self.bad = self.flag > 0
        if self.limit:
            self.skipped += self.bad
            self.flag *= self.skipped > self.limit
            for buffer, good in zip(self.buffers, self.good_buffers):
                buffer.copy_(torch.where(self.bad, good, buffer))
        self.steps_good += self.flag == 0

    def snapshot_if_skipping(self) -> None:
        """Snapshot after a good step (only if steps may be skipped)."""
        if self.limit:
            self.snapshot()

    def mask_bad(self, x: Tensor) -> Tensor:
        """Return a figure of the last step as it is added to sums: 0 where the step was bad."""
        return torch.where(self.bad, torch.zeros_like(x), x)

    def skipped_mask(self) -> Tensor:
        """Return whether the last step was skipped, and is not the one that ends the run."""
        return self.bad & (self.flag == 0)

    def check_finite(self) -> tuple[int, dict[str, float]] | None:
        """Read the flag (waits for the device); if it is set, return the number of good steps and the bad terms."""
        skipped = min(int(self.skipped.item()), self.limit) if self.limit else 0
        if skipped > self.num_reported and self.mesh.rank == 0:
            warnings.warn(f"{skipped} of at most {self.limit} steps skipped: their loss was not finite", stacklevel=2)
        self.num_reported = skipped
        if not self.flag.item():
            self.snapshot()
            return None
        assert self.terms is not None
        self.skipped.fill_(skipped)  # the step that ends the run is not skipped but done again
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.good_buffers)
        self.terms = self.mesh.mean(self.terms) * self.terms_scale
        return self.steps_before + int(self.steps_good.item()), dict(zip(self.names, self.terms.tolist()))


def _ignores_flag(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether a fused optimizer of this kind steps on this device in spite of the flag (MPS, in torch 2.12)."""
    parameter = nn.Parameter(torch.ones(1, device=device))
    parameter.grad = torch.ones_like(parameter)
    probe = type(optimizer)([parameter], lr=0.5, fused=True)  # type: ignore[call-arg]
    probe.grad_scale, probe.found_inf = None, torch.ones((), device=device)  # type: ignore[attr-defined]
    probe.step()
    return bool((parameter != 1).any())
