"""What a method is told of a training step whose weights it may change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainingStep:
    """A step of a run, for `Method.before_step` and `Method.after_step`; the host knows all of it but `good`.

    >>> TrainingStep(number=7, epoch=1, ends_epoch=True)
    TrainingStep(number=7, epoch=1, ends_epoch=True, good=None)
    """

    number: int
    """Steps before this one in the whole run."""
    epoch: int
    """Number of the epoch, from 0."""
    ends_epoch: bool
    """Whether this is the epoch's last step."""
    good: Tensor | None = None
    """After the step, whether it was made, one number on the device. It is False where the loss or a gradient was not
    finite; then weights have to stay as they are (by `torch.where`, which does not wait for the device)."""
