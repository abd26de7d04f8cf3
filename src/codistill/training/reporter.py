"""What a run tells its surroundings: a reporter to listen with, and the run in a few lines."""

from __future__ import annotations

from codistill.runs.records import EpochLine, RunResult


class Reporter:
    """What a run tells its surroundings; this one keeps silent."""

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Hear that the run starts (or goes on) at epoch `start`; `notes` describe it."""

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Hear of a log point: `loss` is the epoch's mean so far."""

    def epoch(self, line: EpochLine) -> None:
        """Hear that an epoch is over; `line` is what metrics.jsonl holds of it."""

    def end(self, result: RunResult) -> None:
        """Hear that the run is complete."""
