"""Which rank died or hangs: every rank says through the job's store that it lives, and what ended it.

A collective that fails or waits in vain says that somebody is missing, not who. Each rank therefore raises a count
about once a second, from a thread of its own, in the store that torchrun keeps (it outlives every rank). When a
collective fails, the ranks that are left look who has confessed a failure and whose count stands still.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

from codistill.utils.errors import MachineError, OtherRankFailedError

INTERVAL = 0.5  # seconds between two beats
MAX_MISSED_BEATS = 4  # beats that a living rank may miss


def meet(store: Store, rank: int, world: int, patience: float) -> Store:
    """Return a part of `store` that belongs to the processes that are here now.

    After a restart torchrun may hand out the store of before, with the addresses of processes that are dead. Every
    process therefore greets with a name that nobody had before it, until the first rank has answered all of them.

    Raises:
        MachineError: some rank has not come.
    """
    name, ends = uuid.uuid4().hex, time.monotonic() + patience
    store.set(f"greeting/{rank}", name)
    if rank:
        store.wait([f"answer/{name}"], timedelta(seconds=patience))
        common = store.get(f"answer/{name}").decode()
        store.set(f"heard/{common}/{rank}", "")
        return PrefixStore(common, store)
    missing = set(range(1, world))
    while missing:
        for other in missing:
            if store.check([f"greeting/{other}"]):  # perhaps of one that is dead, until the living one writes its own
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", name)
        missing -= {other for other in missing if store.check([f"heard/{name}/{other}"])}
        if time.monotonic() > ends:
            raise MachineError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {patience:g} seconds")
        time.sleep(0.02)
    return PrefixStore(name, store)


class Heartbeat:
    """Beats until `stop`.

    Args:
        store: Where all ranks of the job meet.
        rank: This one.
        world: How many there are.
    """

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store = PrefixStore("codistill", store)
        self.rank, self.world = rank, world
        self.step = 0
        """Steps done, as the loop says; a rank that hangs is behind the others."""
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
        """Beat no more."""
        self._ended.set()
        self._thread.join(timeout=5)

    def report_failure(self, reason: str) -> None:
        """Leave word of why this rank ends, unless it is that another one did."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"end/{self.rank}", reason.splitlines()[0][:500] if reason else "an error")
        self.stop()

    def diagnose(self, reason: str) -> MachineError | OtherRankFailedError:
        """Return the sentence that names the rank that is missing; the first living rank says it, the others nothing.

        Args:
            reason: What the failed collective said.
        """
        try:
            confessed, silent = self._look()
        except RuntimeError:
            return MachineError("the job's store is gone: the machine that holds it, or torchrun on it, has ended")
        living = [r for r in range(self.world) if r not in confessed and r not in silent]
        if living and self.rank != living[0]:
            return OtherRankFailedError(1)
        if confessed:
            said = "; ".join(f"rank {r} ({self._place(r)}) ended: {why}" for r, why in confessed.items())
            return MachineError(f"{said}; continue with --resume auto")
        if silent:
            who = "; ".join(f"rank {r} ({self._place(r)})" for r in silent)
            return MachineError(
                f"{who} no longer answers: it was killed, ran out of memory or was stopped; continue with --resume auto"
            )
        behind = self._behind()
        return MachineError(
            f"an exchange between ranks failed ({reason}){behind}; raise --collective-timeout if a step may take that "
            "long, or continue with --resume auto"
        )

    def _look(self) -> tuple[dict[int, str], list[int]]:
        """Return who confessed what, and whose count stands still."""
        before = self._beats()
        time.sleep(INTERVAL * MAX_MISSED_BEATS)
        after = self._beats()
        ended = [r for r in range(self.world) if self.store.check([f"end/{r}"])]
        confessed = {r: self.store.get(f"end/{r}").decode() for r in ended}
        silent = [r for r in range(self.world) if before[r] == after[r] and r not in confessed and r != self.rank]
        return confessed, silent

    def _beats(self) -> list[str]:
        return [beat.decode() for beat in self.store.multi_get([f"beat/{r}" for r in range(self.world)])]

    def _behind(self) -> str:
        """Say which ranks have done fewer steps than the furthest."""
        steps = [int(beat.split()[1]) for beat in self._beats()]
        late = [r for r in range(self.world) if steps[r] < max(steps)]
        return f"; behind the others: rank {', '.join(map(str, late))}" if late else ""

    def _place(self, rank: int) -> str:
        return self.store.get(f"place/{rank}").decode()
