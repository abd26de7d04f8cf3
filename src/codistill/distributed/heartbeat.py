"""Which rank ended or hangs: every rank writes to the job's store that it is alive, and what ended it.

A collective that fails or times out says that a rank is missing, not which. Each rank therefore counts up about twice a
second, in a thread of its own, in the store that torchrun keeps (it outlives every rank). When a collective fails, the
remaining ranks read which ranks have reported a failure and whose count has stopped.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import PrefixStore, Store

from codistill.utils import MachineError, OtherRankFailedError

Answer = TypeVar("Answer")
ANSWER_SECONDS = 20.0
"""Time that the job's store has for an answer, or the time of a collective where that is less."""
INTERVAL = 0.5  # seconds between two beats
MAX_MISSED_BEATS = 4  # beats that a living rank may miss


def rendezvous(store: Store, rank: int, world: int, timeout: float) -> Store:
    """Return a part of `store` that belongs to the processes of this start of the job.

    After a restart torchrun may hand out the store of before, with the addresses of processes that have ended. Every
    process therefore writes a name that is new, until the main rank has answered all of them.

    Args:
        store: The job's store.
        rank: Number of this process.
        world: Number of processes.
        timeout: Seconds to wait for the others.

    Raises:
        MachineError: a rank did not come.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"greeting/{rank}", name)
    if rank:
        store.wait([f"answer/{name}"], timedelta(seconds=timeout))
        common = store.get(f"answer/{name}").decode()
        store.set(f"heard/{common}/{rank}", "")
        return PrefixStore(common, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"greeting/{other}"]):  # perhaps of an ended process, until the new one overwrites it
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", name)
        missing -= {other for other in missing if store.check([f"heard/{name}/{other}"])}
        if time.monotonic() > deadline:
            raise MachineError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {timeout:g} seconds")
        time.sleep(0.02)
    return PrefixStore(name, store)


class Heartbeat:
    """Counts up in the store until `stop`, in a thread of its own.

    Args:
        store: The store that all ranks of the job share.
        rank: Number of this rank.
        world: Number of ranks.
        timeout: Seconds that a collective may take.
    """

    def __init__(self, store: Store, rank: int, world: int, timeout: float = ANSWER_SECONDS) -> None:
        self.store = PrefixStore("codistill", store)
        self.rank, self.world = rank, world
        self._answer_seconds = min(ANSWER_SECONDS, max(timeout, 2 * INTERVAL * MAX_MISSED_BEATS))
        self._store_answers = True
        self.step = 0
        """Steps done, set by the training loop; a rank that hangs is behind the others."""
        self._ended = threading.Event()
        self.store.set(f"place/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.store.set(f"beat/{rank}", "0 0")
        self._thread = threading.Thread(target=self._beat, name="codistill-heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(INTERVAL):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", f"{count} {self.step}")
            except RuntimeError:  # the store went first: the job is ending
                return

    def stop(self) -> None:
        """Stop counting."""
        self._ended.set()
        self._thread.join(timeout=5 if self._store_answers else 0)

    def report_failure(self, reason: str) -> None:
        """Write the reason why this rank ends to the store, and stop counting."""
        self._ask_store(lambda: self.store.set(f"end/{self.rank}", reason.splitlines()[0][:500]))
        self.stop()

    def diagnose(self, reason: str) -> MachineError | OtherRankFailedError:
        """Return the error that names the missing rank: the first living rank reports it, the others stay silent.

        Args:
            reason: Message of the failed collective.
        """
        found = self._ask_store(lambda: self._diagnose(reason))
        if found is None:
            return MachineError(
                "the job's store is gone or does not answer: the machine that holds it, torchrun on it or rank 0 has "
                "ended or was stopped; continue with --resume auto"
            )
        return found

    def _ask_store(self, question: Callable[[], Answer]) -> Answer | None:
        """Return the store's answer; None where it fails or takes too long, and for every question after that.

        Where no torchrun keeps the store, a rank does; if that one is stopped, a question would wait for ever.
        """
        answers: list[Answer] = []
        if not self._store_answers:
            return None

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self._answer_seconds)
        self._store_answers = bool(answers)
        return answers[0] if answers else None

    def _diagnose(self, reason: str) -> MachineError | OtherRankFailedError:
        failures, silent = self._find_failures()
        living = [r for r in range(self.world) if r not in failures and r not in silent]
        if living and self.rank != living[0]:
            return OtherRankFailedError(1)
        if failures:
            ended = "; ".join(f"rank {r} ({self._place(r)}) ended: {why}" for r, why in failures.items())
            return MachineError(f"{ended}; continue with --resume auto")
        if silent:
            ranks = "; ".join(f"rank {r} ({self._place(r)})" for r in silent)
            return MachineError(
                f"{ranks} no longer answers: it was killed, ran out of memory or was stopped; "
                "continue with --resume auto"
            )
        behind = self._describe_late_ranks()
        return MachineError(
            f"an exchange between ranks failed ({reason}){behind}; raise --collective-timeout if a step may take that "
            "long, or continue with --resume auto"
        )

    def _find_failures(self) -> tuple[dict[int, str], list[int]]:
        """Return the reported failures by rank, and the ranks whose count has stopped."""
        before = self._read_beats()
        time.sleep(INTERVAL * MAX_MISSED_BEATS)
        after = self._read_beats()
        ended = [r for r in range(self.world) if self.store.check([f"end/{r}"])]
        failures = {r: self.store.get(f"end/{r}").decode() for r in ended}
        silent = [r for r in range(self.world) if before[r] == after[r] and r not in failures and r != self.rank]
        return failures, silent

    def _read_beats(self) -> list[str]:
        return [beat.decode() for beat in self.store.multi_get([f"beat/{r}" for r in range(self.world)])]

    def _describe_late_ranks(self) -> str:
        """Name the ranks that have done fewer steps than the furthest."""
        steps = [int(beat.split()[1]) for beat in self._read_beats()]
        late = [r for r in range(self.world) if steps[r] < max(steps)]
        return f"; behind the others: rank {', '.join(map(str, late))}" if late else ""

    def _place(self, rank: int) -> str:
        return self.store.get(f"place/{rank}").decode()
