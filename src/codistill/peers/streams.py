"""Running the members' forward passes on CUDA streams of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def run_side_by_side(calls: Sequence[Callable[[], Tensors]]) -> list[Tensors]:
    """Run independent calls; while a CUDA graph is captured, each on its own stream, so that a replay overlaps them.

    One member's kernels are too small to use a whole GPU. Backward runs on the streams of the forward.

    >>> run_side_by_side([lambda: (torch.zeros(1),), lambda: (torch.ones(1),)])
    [(tensor([0.]),), (tensor([1.]),)]
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return [call() for call in calls]
    here, results = torch.cuda.current_stream(), []
    streams = [torch.cuda.Stream() for _ in calls]
    for stream, call in zip(streams, calls):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(call())
    for stream, tensors in zip(streams, results):
        here.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(here)  # else its memory could be given to its own stream while this one still reads it
    return results
