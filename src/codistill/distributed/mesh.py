"""A mesh of processes, data x peer: the axis `data` shares out each batch, the axis `peer` the peers.

Every rank builds its own members only. What peers say of the rank's rows is gathered along `peer`, as constants, and
the rank's own part is put back live; the whole loss is then computed on every rank. The gradient that reaches the
rank's own members is complete, also where targets are not detached: it has come through every term. A method's own
parameters are held by all ranks; they see all values and so get the whole gradient everywhere. Gradients are summed
along `data`, each rank's loss weighted by its part of the batch.
Shapes: P peers, K own members, B batch, C classes, D features, N rows of packed numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from codistill.config.config import Config
from codistill.distributed.heartbeat import Heartbeat, meet
from codistill.utils.errors import InputError, MachineError, OtherRankFailedError

BUCKET = 25 * 2**20  # bytes of gradients that travel together
Value = TypeVar("Value")


def backend_for(device: torch.device) -> str:
    """Return the backends that carry tensors of `device`, and the host's.

    Raises:
        InputError: this torch lacks one.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        raise InputError("--mesh needs a torch built with torch.distributed and gloo; this one has none, run without")
    if device.type == "cpu":
        return "gloo"
    if device.type == "cuda" and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    need = "a torch built with NCCL" if device.type == "cuda" else "CPUs or CUDA GPUs"
    raise InputError(f"--mesh on --device {device.type} needs {need}; give --device cpu")


class Mesh:
    """The rank's place among D x P ranks, and what goes between them.

    Args:
        shape: (D, P).
        config: A resolved config.
        device: Where this rank's tensors live.
    """

    def __init__(self, shape: tuple[int, int], config: Config, device: torch.device) -> None:
        assert config.peers is not None
        timeout = timedelta(seconds=config.collective_timeout)
        backend = backend_for(device)
        if not dist.is_initialized():
            store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            store = meet(store, rank, world, config.collective_timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
            _JOB.append(Heartbeat(store, rank, world))
        self.heartbeat = _JOB[-1]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.seed, self.sync_bn = device, config.seed, config.sync_bn
        self.num_data, self.num_peer = shape
        ranks = torch.arange(self.world).view(shape)
        # Made here and not by init_device_mesh, whose groups would wait for their backend's default time.
        self.data_group, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist(), timeout=timeout)
        self.peer_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
        groups: Any = [self.data_group, self.peer_group]
        self.axes = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=("data", "peer"))
        self.data_index, self.peer_index = self.axes["data"].get_local_rank(), self.axes["peer"].get_local_rank()
        share = config.peers // self.num_peer
        self.own = range(self.peer_index * share, (self.peer_index + 1) * share)
        """Numbers of this rank's members."""
        self.sent: Counter[str] = Counter()
        """Bytes that this rank has sent, by purpose (as a ring sends them)."""
        self.rows: list[int] = [0] * self.num_data
        """Samples of the present batch on each rank of the axis `data`."""
        self.step = self._draws = 0
        self._over = False

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # copies of what holds it talk through the same groups

    # -- the batch -----------------------------------------------------------------------------------------------------

    def open(self, count: int, step: int) -> None:
        """Begin step number `step`, on a batch of `count` samples."""
        self.rows = [count // self.num_data + (d < count % self.num_data) for d in range(self.num_data)]
        self.step = self.heartbeat.step = step
        self._draws = 0

    @property
    def idle(self) -> bool:
        """Whether the batch has no sample for this rank, which then runs one with no weight."""
        return self.rows[self.data_index] == 0

    def own_rows(self) -> slice:
        """Return which samples of the batch are this rank's."""
        first = sum(self.rows[: self.data_index])
        return slice(first, first + self.rows[self.data_index]) if not self.idle else slice(0, 1)

    def weight(self, needs_full_batch: bool) -> float:
        """Return the weight of this rank's loss: its part of the batch, 1 where every rank's is of the whole."""
        return 1.0 if needs_full_batch else self.rows[self.data_index] / sum(self.rows)

    def num_counted(self, needs_full_batch: bool) -> int:
        """Return how many samples this rank adds to sums over the epoch, so that the axis `data` adds up to all."""
        if needs_full_batch:
            return sum(self.rows) if self.data_index == 0 else 0
        return self.rows[self.data_index]

    @contextmanager
    def rank_rng(self) -> Iterator[None]:
        """Draw (dropout) from a stream of this rank and step, so that what all ranks draw in common stays in common."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            place = (self.step * 1_000 + self._draws) * self.world + self.rank
            torch.manual_seed((self.seed * 1_000_003 + place * 7_919 + 54_321) % 2**63)
            self._draws += 1
            yield

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def _call(self, what: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Run a collective; a failure becomes the sentence that names the missing rank."""
        try:
            return what(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self.heartbeat.diagnose(str(error).splitlines()[0]) from None

    def exchange(self, x_RN: Tensor, axis: str, rows: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
        """Return what every rank of `axis` gives, in order: others' as constants, this rank's own as it is, live.

        Args:
            x_RN: This rank's rows of numbers.
            axis: `data` or `peer`.
            rows: Number of rows of each rank.
            widths: Numbers a row of each rank.
        """
        group, index = (self.data_group, self.data_index) if axis == "data" else (self.peer_group, self.peer_index)
        most_rows, most_width = max(rows), max(widths)
        padded = x_RN.detach().contiguous()
        if padded.shape != (most_rows, most_width):
            padded = padded.new_zeros(most_rows, most_width)
            padded[: rows[index], : widths[index]] = x_RN.detach()
        gathered = padded.new_empty(len(rows), most_rows, most_width)
        self._call(dist.all_gather, list(gathered.unbind()), padded, group=group)
        self.sent[f"{axis}: outputs"] += (len(rows) - 1) * padded.numel() * padded.element_size()
        return [x_RN if r == index else gathered[r, : rows[r], : widths[r]] for r in range(len(rows))]

    def gather_along_data(self, x_N: Tensor) -> Tensor:
        """Return every data rank's numbers, `ranks x N` (statistics of a normalisation)."""
        gathered = x_N.new_empty(self.num_data, x_N.numel())
        self._call(dist.all_gather, list(gathered.unbind()), x_N.contiguous(), group=self.data_group)
        self.sent["data: statistics"] += (self.num_data - 1) * x_N.numel() * x_N.element_size()
        return gathered

    def sum_along_data(self, x: Tensor, purpose: str = "sums") -> Tensor:
        """Return the sum over the axis `data`."""
        total = x.clone(memory_format=torch.contiguous_format)
        if self.num_data > 1:
            self._reduce(total, self.data_group, self.num_data, f"data: {purpose}")
        return total

    def _reduce(self, x: Tensor, group: Any, ranks: int, purpose: str, op: Any = dist.ReduceOp.SUM) -> None:
        self._call(dist.all_reduce, x, op=op, group=group)
        self._count_reduce(purpose, x, ranks)

    def _count_reduce(self, purpose: str, x: Tensor, ranks: int) -> None:
        self.sent[purpose] += 2 * (ranks - 1) * x.numel() * x.element_size() // ranks

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add gradients up along `data`, several in one message; the messages are on their way together."""
        if self.num_data == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        pending = []
        for bucket in _buckets(gradients):
            flat = torch.cat([g.flatten() for g in bucket])
            work = self._call(dist.all_reduce, flat, group=self.data_group, async_op=True)
            self._count_reduce("data: gradients", flat, self.num_data)
            pending.append((bucket, flat, work))
        for bucket, flat, work in pending:
            self._call(work.wait)
            parts = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view(g.shape) for part, g in zip(parts, bucket)])

    def all_reduce_flag(self, flag: Tensor) -> None:
        """Raise the flag on all ranks if it is up on one; on the device, the host waits for nothing."""
        self._reduce(flag, None, self.world, "world: flag", dist.ReduceOp.MAX)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over all ranks (NaN where one has it)."""
        total = x.clone()
        self._reduce(total, None, self.world, "world: terms")
        return total / self.world

    @torch.no_grad()
    def align(self, modules: Sequence[nn.Module], replicated: nn.Module) -> None:
        """Average running statistics over the axis `data`, and copy what all ranks hold in common from the first.

        Averages of averages that all move at one rate are the average of what they averaged, so this may be done as
        seldom as anybody looks at them. The copies keep ranks from drifting apart by rounding.
        """
        if self.num_data > 1:
            own = {id(b): b for m in modules for b in m.buffers() if b.is_floating_point()}
            for bucket in _buckets(list(own.values())):
                flat = self.sum_along_data(torch.cat([b.flatten() for b in bucket]), "statistics") / self.num_data
                parts = flat.split([b.numel() for b in bucket])
                torch._foreach_copy_(bucket, [part.view(b.shape) for part, b in zip(parts, bucket)])
        for tensor in [*replicated.parameters(), *replicated.buffers()]:
            self._call(dist.broadcast, tensor.detach(), 0)
            self.sent["world: method"] += tensor.numel() * tensor.element_size()

    def shard(self, count: int) -> list[int]:
        """Return where the parts of `count` samples begin, one a rank of `data`, and where the last ends."""
        return [count * d // self.num_data for d in range(self.num_data + 1)]

    def all_samples(self, logits_PNC: Tensor, count: int) -> Tensor:
        """Put the outputs on this rank's part of `count` samples and on the others' together, in order."""
        bounds = self.shard(count)
        rows = [last - first for first, last in pairwise(bounds)]
        packed = logits_PNC.transpose(0, 1).flatten(1)
        whole = torch.cat(self.exchange(packed, "data", rows, [packed.shape[1]] * self.num_data))
        return whole.unflatten(1, logits_PNC.shape[::2]).transpose(0, 1)

    # -- between hosts -------------------------------------------------------------------------------------------------

    def all_gather_object(self, value: Value) -> list[Value]:
        """Return a plain value of every rank (the host waits)."""
        return self._gather_or_fail(value, None)

    def _gather_or_fail(self, value: Any, failure: tuple[str, str] | None) -> list[Any]:
        """Exchange values; a rank that has none for its failure ends all, wherever they are."""
        told: list[Any] = [None] * self.world
        self._call(dist.all_gather_object, told, (value, failure))
        for rank, (_, said) in enumerate(told):
            if said is not None:
                self._over = True
                kind = InputError if said[0] == "InputError" else MachineError
                if self.rank:
                    raise OtherRankFailedError(2 if kind is InputError else 1)
                raise kind(said[1] if rank == 0 else f"rank {rank}: {said[1]}")
        return [value for value, _ in told]

    def gather_peers(self, value: Value) -> list[Value] | None:
        """Return, on the first rank, a value of each rank of its axis `peer`; None elsewhere."""
        if self.data_index:
            return None
        values: list[Any] | None = [None] * self.num_peer if self.rank == 0 else None
        self._call(dist.gather_object, value, values, dst=0, group=self.peer_group)
        return values

    def run_on_all_ranks(self, what: Callable[[], Value]) -> Value:
        """Run what may fail on every rank; if it fails on one, all fail, and the first such rank's reason is told."""
        try:
            value = what()
        except (InputError, MachineError) as error:
            if not self._over:
                self._gather_or_fail(None, (type(error).__name__, str(error)))
            raise
        self._gather_or_fail(None, None)
        return value

    def run_on_main_rank(self, what: Callable[[], Value]) -> Value:
        """Run something on the first rank alone and return what it returned, or raise what it raised, on every rank."""
        value = self.run_on_all_ranks(lambda: what() if self.rank == 0 else None)
        values: list[Any] = [value]
        self._call(dist.broadcast_object_list, values, 0)
        return values[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Leave word in the job's store of why this rank ends, for those that will wait for it."""
        try:
            yield
        except OtherRankFailedError:
            raise
        except BaseException as error:
            self.heartbeat.report_failure(f"{type(error).__name__}: {error}")
            raise

    def first_signal(self, caught: Sequence[str]) -> str | None:
        """Return the name of a signal that any rank has caught."""
        return next((names[0] for names in self.all_gather_object(list(caught)) if names), None)


_JOB: list[Heartbeat] = []  # this process's, once it has met the others; several runs one after the other share it


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
