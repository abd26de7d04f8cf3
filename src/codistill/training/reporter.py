"""`Reporter`: called as a run advances, for progress output."""

from __future__ import annotations

from codistill.runs.records import EpochLine, RunResult


class Reporter:
    """Called as a run advances; this one prints nothing."""

    def begin(self, notes: list[str], epochs: int, steps: int, start: int) -> None:
        """Receive the start (or continuation) of training.

        Args:
            notes: Sentences that describe the run.
            epochs: Number of epochs.
            steps: Steps per epoch.
            start: Number of the first epoch to train.
        """

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Receive a step, every `log_every_steps`; `loss` is the mean of this epoch so far."""

    def epoch(self, line: EpochLine) -> None:
        """Receive the end of an epoch; `line` is its line of metrics.jsonl."""

    def end(self, result: RunResult) -> None:
        """Receive the end of the run; `result` is the content of result.json."""
