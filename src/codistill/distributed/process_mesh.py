"""A mesh whose ranks are processes: the collectives, on tensors and on plain values, through torch.distributed.

Shapes: D data ranks, P peers, N samples or numbers, C classes, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from codistill.distributed.heartbeat import Heartbeat
from codistill.distributed.mesh import Mesh, Value
from codistill.utils import InputError, MachineError, OtherRankFailedError, SignalReceived, first_line

BUCKET = 25 * 2**20  # bytes of gradients in one message


class ProcessMesh(Mesh):
    """A mesh whose ranks exchange tensors through the default process group, which `init_mesh` has set up.

    Args:
        shape: (D, P).
        num_peers: Number of all peers.
        device: Where this rank's tensors live.
        heartbeat: Names the rank that is missing when a collective fails.
        timeout: Seconds that a collective may take.
        seed: Of the streams that ranks draw from.
        sync_bn: Whether BatchNorm uses the statistics of the batch of all ranks.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        num_peers: int,
        device: torch.device,
        heartbeat: Heartbeat,
        *,
        timeout: float,
        seed: int,
        sync_bn: bool,
    ) -> None:
        super().__init__(shape, dist.get_rank(), num_peers, device)
        self.heartbeat, self.seed, self.sync_bn = heartbeat, seed, sync_bn
        ranks = torch.arange(self.world).view(shape)
        wait = timedelta(seconds=timeout)
        # Made here and not by init_device_mesh, whose groups would wait for their backend's default time.
        self.data_group, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist(), timeout=wait)
        self.peer_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=wait)
        groups: Any = [self.data_group, self.peer_group]
        self.axes = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("data", "peer"))
        self.bytes_sent: Counter[str] = Counter()
        """Bytes that this rank has sent, by purpose (as a ring sends them)."""
        self._num_draws = 0
        self._failed = False

    def begin_step(self, num_samples: int, step: int) -> None:
        """Begin step number `step` on a batch of `num_samples`; the heartbeat reports the number."""
        super().begin_step(num_samples, step)
        self.heartbeat.step = step
        self._num_draws = 0

    @contextmanager
    def rank_rng(self) -> Iterator[None]:
        """Draw (dropout) from a stream of this rank and step; the stream that all ranks share stays the same."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            stream = (self.step * 1_000 + self._num_draws) * self.world + self.rank
            torch.manual_seed((self.seed * 1_000_003 + stream * 7_919 + 54_321) % 2**63)
            self._num_draws += 1
            yield

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _run_collective(self, collective: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Run a collective; a failure becomes the sentence that names the missing rank."""
        try:
            return collective(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self.heartbeat.diagnose(first_line(error)) from None

    def all_gather(
        self, x_RN: Tensor, axis: Literal["data", "peer"], rows: Sequence[int], widths: Sequence[int]
    ) -> list[Tensor]:
        """Return the tensors of all ranks of `axis`, in order: others' as constants, this rank's own with its graph.

        Args:
            x_RN: This rank's rows.
            axis: `data` or `peer`.
            rows: Number of rows of each rank.
            widths: Numbers per row of each rank.
        """
        group, index = (self.data_group, self.data_index) if axis == "data" else (self.peer_group, self.peer_index)
        max_rows, max_width = max(rows), max(widths)
        padded = x_RN.detach().contiguous()
        if padded.shape != (max_rows, max_width):
            padded = padded.new_zeros(max_rows, max_width)
            padded[: rows[index], : widths[index]] = x_RN.detach()
        gathered = padded.new_empty(len(rows), max_rows, max_width)
        self._run_collective(dist.all_gather, list(gathered.unbind()), padded, group=group)
        self.bytes_sent[f"{axis}: outputs"] += (len(rows) - 1) * padded.numel() * padded.element_size()
        return [x_RN if r == index else gathered[r, : rows[r], : widths[r]] for r in range(len(rows))]

    def gather_statistics(self, x_N: Tensor) -> Tensor:
        """Return every data rank's numbers, `D x N` (statistics of a normalization)."""
        gathered = x_N.new_empty(self.num_data, x_N.numel())
        self._run_collective(dist.all_gather, list(gathered.unbind()), x_N.contiguous(), group=self.data_group)
        self.bytes_sent["data: statistics"] += (self.num_data - 1) * x_N.numel() * x_N.element_size()
        return gathered

    def sum_along_data(self, x: Tensor, purpose: str = "sums") -> Tensor:
        """Return the sum over the axis `data`, as a copy."""
        total = x.clone(memory_format=torch.contiguous_format)
        if self.num_data > 1:
            self._all_reduce(total, self.data_group, self.num_data, f"data: {purpose}")
        return total

    def sum_along_peer(self, x: Tensor) -> Tensor:
        """Return the sum over the axis `peer`, as a copy."""
        total = x.clone(memory_format=torch.contiguous_format)
        if self.num_peer > 1:
            self._all_reduce(total, self.peer_group, self.num_peer, "peer: sums")
        return total

    @torch.no_grad()
    def send_along_peer(self, tensors: Sequence[Tensor], source: int) -> list[Tensor]:
        """Return the tensors of one rank of the axis `peer` on all of its ranks, as copies.

        Args:
            tensors: On rank `source` what is sent; on the others tensors of the same shapes and dtypes.
            source: Index along `peer`.
        """
        received: dict[int, Tensor] = {}
        root = self.data_index * self.num_peer + source
        for bucket in _buckets(tensors):
            flat = torch.cat([x.flatten() for x in bucket])
            self._run_collective(dist.broadcast, flat, root, group=self.peer_group)
            if source == self.peer_index:
                self.bytes_sent["peer: snapshots"] += (self.num_peer - 1) * flat.numel() * flat.element_size()
            parts = flat.split([x.numel() for x in bucket])
            received |= {id(x): part.view(x.shape) for x, part in zip(bucket, parts)}
        return [received[id(x)] for x in tensors]

    def _all_reduce(self, x: Tensor, group: Any, ranks: int, purpose: str, op: Any = dist.ReduceOp.SUM) -> None:
        self._run_collective(dist.all_reduce, x, op=op, group=group)
        self._count_all_reduce(purpose, x, ranks)

    def _count_all_reduce(self, purpose: str, x: Tensor, ranks: int) -> None:
        self.bytes_sent[purpose] += 2 * (ranks - 1) * x.numel() * x.element_size() // ranks

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum gradients along `data`, in place; several share a message, and the messages overlap."""
        if self.num_data == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        pending = []
        for bucket in _buckets(gradients):
            flat = torch.cat([g.flatten() for g in bucket])
            work = self._run_collective(dist.all_reduce, flat, group=self.data_group, async_op=True)
            self._count_all_reduce("data: gradients", flat, self.num_data)
            pending.append((bucket, flat, work))
        for bucket, flat, work in pending:
            self._run_collective(work.wait)
            _copy_from_flat(bucket, flat)

    def all_reduce_flag(self, flag: Tensor) -> None:
        """Set the flag on all ranks if it is set on one; on the device, without a host read."""
        self._all_reduce(flag, None, self.world, "world: flag", dist.ReduceOp.MAX)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all ranks (NaN where one rank has NaN)."""
        total = x.clone()
        self._all_reduce(total, None, self.world, "world: terms")
        return total / self.world

    @torch.no_grad()
    def sync_buffers(self, modules: Sequence[nn.Module], replicated: nn.Module) -> None:
        """Average running statistics over the axis `data`, and broadcast the replicated tensors from the main rank."""
        if self.num_data > 1:
            buffers = {id(b): b for m in modules for b in m.buffers() if b.is_floating_point()}
            for bucket in _buckets(list(buffers.values())):
                flat = self.sum_along_data(torch.cat([b.flatten() for b in bucket]), "statistics") / self.num_data
                _copy_from_flat(bucket, flat)
        for tensor in [*replicated.parameters(), *replicated.buffers()]:
            self._run_collective(dist.broadcast, tensor.detach(), 0)
            self.bytes_sent["world: method"] += tensor.numel() * tensor.element_size()

    def gather_samples(self, logits_PNC: Tensor, count: int) -> Tensor:
        """Concatenate the outputs for all shards of `count` samples, in order."""
        rows = [last - first for first, last in pairwise(self.shard_bounds(count))]
        packed = logits_PNC.transpose(0, 1).flatten(1)
        whole = torch.cat(self.all_gather(packed, "data", rows, [packed.shape[1]] * self.num_data))
        return whole.unflatten(1, logits_PNC.shape[::2]).transpose(0, 1)

    # -- plain values --------------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return a plain value of every rank (the host waits)."""
        return self._gather_or_fail(value, None)

    def _gather_or_fail(self, value: Any, failure: tuple[str, str] | None) -> list[Any]:
        """All-gather (value, error); raise on every rank if any rank failed."""
        gathered: list[Any] = [None] * self.world
        self._run_collective(dist.all_gather_object, gathered, (value, failure))
        for rank, (_, error) in enumerate(gathered):
            if error is not None:
                self._failed = True
                name, message = error
                kind = InputError if name == "InputError" else MachineError
                if self.rank:
                    raise OtherRankFailedError(2 if kind is InputError else 1)
                raise kind(message if rank == 0 else f"rank {rank}: {message}")
        return [value for value, _ in gathered]

    def gather_peers(self, value: Any) -> list[Any] | None:
        """Return, on the main rank, a value of each rank of its axis `peer`, tensors on the CPU; None elsewhere."""
        if self.data_index:
            return None
        values: list[Any] | None = [None] * self.num_peer if self.rank == 0 else None
        self._run_collective(dist.gather_object, _to_cpu(value), values, dst=0, group=self.peer_group)
        return values

    def run_on_all_ranks(self, function: Callable[[], Value]) -> Value:
        """Call a function that may fail on every rank; if it fails on one, every rank raises.

        The main rank raises the error of the first rank that failed, the others `OtherRankFailedError`.
        """
        try:
            value = function()
        except (InputError, MachineError) as error:
            if not self._failed:
                self._gather_or_fail(None, (type(error).__name__, str(error)))
            raise
        self._gather_or_fail(None, None)
        return value

    def run_on_main_rank(self, function: Callable[[], Value]) -> Value:
        """Call a function on the main rank; return its value, or raise its error, on every rank."""
        value = self.run_on_all_ranks(lambda: function() if self.rank == 0 else None)
        values: list[Any] = [value]
        self._run_collective(dist.broadcast_object_list, values, 0)
        return values[0]

    def first_signal(self, caught: Sequence[str]) -> str | None:
        """Return the name of a signal that any rank has caught (the host waits for all ranks)."""
        return next((names[0] for names in self.all_gather_object(list(caught)) if names), None)

    @contextmanager
    def report_failures(self) -> Iterator[None]:
        """Write into the job's store why this rank ends, for the ranks that will wait for it."""
        try:
            yield
        except OtherRankFailedError:
            raise
        except BaseException as error:
            signal = isinstance(error, SignalReceived)
            self.heartbeat.report_failure(f"{'a signal' if signal else type(error).__name__}: {error}")
            raise


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype, up to `BUCKET` bytes together (the last first: their gradients are ready first)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in reversed(tensors):
        if bucket and (tensor.dtype != bucket[0].dtype or size >= BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket


def _copy_from_flat(bucket: list[Tensor], flat: Tensor) -> None:
    """Copy the parts of a flat tensor into the tensors of a bucket."""
    parts = flat.split([x.numel() for x in bucket])
    torch._foreach_copy_(bucket, [part.view(x.shape) for part, x in zip(parts, bucket)])


def _to_cpu(value: Any) -> Any:
    """Move every tensor of nested containers to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(v) for key, v in value.items()}
    return [_to_cpu(v) for v in value] if isinstance(value, list) else value
