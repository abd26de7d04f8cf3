"""A mesh of processes, data x peer: the axis `data` divides each batch, the axis `peer` divides the peers.

Every rank builds its own members only. The outputs for the rank's rows are all-gathered along `peer`: other ranks'
outputs are constants, the rank's own keep their graph. Every rank then computes the whole loss, so the gradient of its
own members is complete, also where targets are not detached: it comes through every term. The method's own parameters
are replicated; they see all outputs and so get the whole gradient on every rank. Gradients are summed along `data`,
where each rank's loss is weighted by its part of the batch.

`SingleProcess` is the mesh of one process. `ProcessMesh` (codistill.distributed.process_mesh) exchanges tensors and
values through torch.distributed.
Shapes: P peers, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from codistill.utils import share_out

Value = TypeVar("Value")


class Mesh:
    """The layout of D x P ranks: which samples of a batch and which members belong to this rank.

    The exchanges of this class are those of a single process: nothing is sent, and values are returned as they are.

    Args:
        shape: (D, P).
        rank: Number of this rank; ranks of one data index are next to each other.
        num_peers: Number of all peers, a multiple of P.
        device: Where this rank's tensors live.
    """

    sync_bn = False

    def __init__(self, shape: tuple[int, int], rank: int, num_peers: int, device: torch.device) -> None:
        self.num_data, self.num_peer = shape
        self.rank, self.world, self.device = rank, self.num_data * self.num_peer, device
        self.data_index, self.peer_index = divmod(rank, self.num_peer)
        count = num_peers // self.num_peer
        self.local_members = range(self.peer_index * count, (self.peer_index + 1) * count)
        """Numbers of this rank's members."""
        self.rows: list[int] = [0] * self.num_data
        """Samples of the current batch on each rank of the axis `data`."""
        self.step = 0

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # copies of a module that holds the mesh use the same process groups

    # -- layout of a batch ---------------------------------------------------------------------------------------------

    def begin_step(self, num_samples: int, step: int) -> None:
        """Begin step number `step` on a batch of `num_samples`."""
        self.rows = share_out(num_samples, self.num_data)
        self.step = step

    @property
    def idle(self) -> bool:
        """Whether the batch has no sample for this rank, which then runs two samples with weight 0."""
        return self.rows[self.data_index] == 0

    def local_rows(self) -> slice:
        """Return which samples of the batch belong to this rank."""
        first = sum(self.rows[: self.data_index])
        return slice(first, first + self.rows[self.data_index]) if not self.idle else slice(0, min(2, sum(self.rows)))

    def loss_weight(self, *, full_batch: bool) -> float:
        """Return the weight of this rank's loss: its part of the batch, or 1 where every rank has the full batch."""
        return 1.0 if full_batch else self.rows[self.data_index] / sum(self.rows)

    def num_counted(self, *, full_batch: bool) -> int:
        """Return how many samples this rank adds to the epoch's sums, so that each sample is counted on one rank."""
        if full_batch:
            return sum(self.rows) if self.data_index == 0 else 0
        return self.rows[self.data_index]

    def shard_bounds(self, count: int) -> list[int]:
        """Return the D + 1 bounds of contiguous shards of `count` samples, one shard per data rank."""
        return [count * d // self.num_data for d in range(self.num_data + 1)]

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def sum_along_data(self, x: Tensor, purpose: str = "sums") -> Tensor:
        """Return the sum over the axis `data`."""
        return x

    def sum_along_peer(self, x: Tensor) -> Tensor:
        """Return the sum over the axis `peer`."""
        return x

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum gradients along `data`, in place."""

    def all_reduce_flag(self, flag: Tensor) -> None:
        """Set the flag on all ranks if it is set on one; on the device, without a host read."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all ranks (NaN where one rank has NaN)."""
        return x

    def sync_buffers(self, modules: Sequence[nn.Module], replicated: nn.Module) -> None:
        """Average running statistics over the axis `data`, and broadcast the replicated tensors from the main rank.

        EMAs are linear, so averaging them over ranks now equals averaging every step. The broadcast keeps ranks from
        diverging by rounding.
        """

    def gather_samples(self, logits_PNC: Tensor, count: int) -> Tensor:
        """Concatenate the outputs for all shards of `count` samples, in order."""
        return logits_PNC

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return a plain value of every rank (the host waits)."""
        return [value]

    def gather_peers(self, value: Any) -> list[Any] | None:
        """Return, on the main rank, a value of each rank of its axis `peer`, tensors on the CPU; None elsewhere."""
        return [value]

    def run_on_all_ranks(self, function: Callable[[], Value]) -> Value:
        """Call a function that may fail on every rank; if it fails on one, every rank raises."""
        return function()

    def run_on_main_rank(self, function: Callable[[], Value]) -> Value:
        """Call a function on the main rank; return its value, or raise its error, on every rank."""
        return function()

    def first_signal(self, caught: Sequence[str]) -> str | None:
        """Return the name of a signal that any rank has caught."""
        return caught[0] if caught else None

    @contextmanager
    def report_failures(self) -> Iterator[None]:
        """Let the other ranks know why this one ends."""
        yield


class SingleProcess(Mesh):
    """The mesh of one process: it holds the whole batch and all peers, and exchanges nothing.

    Args:
        device: Where tensors live.
        num_peers: Number of peers.
    """

    def __init__(self, device: torch.device, num_peers: int) -> None:
        super().__init__((1, 1), 0, num_peers, device)
