"""Forward and backward of a training step as one captured CUDA graph: a replay costs one launch instead of thousands.

The graph contains what the step computes up to the gradients. The finite guard, the optimizer, the mean teachers'
update and the sums run after it, eagerly, so learning rates and counts can stay on the host. The numbers are those of
the eager step: the same kernels run on the same inputs.
Shapes: V views, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[dict[str, Tensor], Tensor]
"""The method's terms, and every member's number of correct guesses."""
Compute = Callable[[Tensor, Tensor, Tensor, float | Tensor], Outputs]
"""(views, targets, labels, distillation weight) -> outputs; the gradients are left in the parameters."""

WARM_UP = 3
"""Eager steps before a capture: they choose kernels and allocate workspaces, which a capture cannot do."""


class StepGraph:
    """Runs the forward and backward of a step, eagerly at first and then as a captured CUDA graph.

    Every shape of batch has its own graph (the last batch of an epoch is usually smaller); all share one memory pool.
    The first steps of a shape are ordinary eager steps of the run, so nothing has to be undone after them. If a step
    cannot be captured (for example because a network reads a number back to the host), a warning says so and all
    further steps are eager.

    Args:
        parameters: What the optimizer updates; their gradients are `None` before every step.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.captured: dict[tuple[object, ...], CapturedStep] = {}
        self.eager_steps: dict[tuple[object, ...], int] = {}
        self.refused = False
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None

    def __call__(
        self, compute: Compute, views_VBCHW: Tensor, targets: Tensor, labels_B: Tensor, weight: float, variant: int = 0
    ) -> Outputs:
        """Return what `compute` returns, and leave the gradients in the parameters.

        The outputs are overwritten by the next step of the same shape. Where a step depends on a number of the host
        (rows of a buffer that it reads), that is the `variant`: each has its own graph.
        """
        inputs = views_VBCHW, targets, labels_B
        key = (variant, *((x.shape, x.dtype) for x in inputs))
        if key in self.captured:
            return self.captured[key].replay(inputs, weight)
        done = self.eager_steps.get(key, 0)
        if self.refused:
            return compute(*inputs, weight)
        if done < WARM_UP:
            self.eager_steps[key] = done + 1
            return self._warm_up(compute, inputs, weight, watched=done + 1 == WARM_UP)
        here = torch.cuda.current_stream() if views_VBCHW.device.type == "cuda" else None
        try:
            self.captured[key] = CapturedStep(self, compute, inputs)
        except RuntimeError as error:
            _undo_failed_capture(here)
            for parameter in self.parameters:
                parameter.grad = None
            self._refuse(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
            return compute(*inputs, weight)
        return self.captured[key].replay(inputs, weight)

    def _refuse(self, reason: str) -> None:
        """Run all further steps eagerly, and warn with the reason."""
        self.refused = True
        self.captured.clear()
        warnings.warn(
            f"the training step cannot be captured as a CUDA graph and runs eagerly ({reason}); "
            "--no-cuda-graph leaves out the attempt",
            stacklevel=4,
        )

    def _warm_up(
        self, compute: Compute, inputs: tuple[Tensor, Tensor, Tensor], weight: float, watched: bool
    ) -> Outputs:
        """Do an eager step on the stream of the capture, so that its library handles and workspaces exist.

        Args:
            compute: Computes the gradients.
            inputs: The batch.
            weight: The distillation weight.
            watched: Whether to look for reads by the host, which make a capture impossible.
        """
        if inputs[0].device.type != "cuda":
            return compute(*inputs, weight)
        here = torch.cuda.current_stream()
        self.stream = torch.cuda.Stream() if self.stream is None else self.stream
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=watched) as caught:
            mode = torch.cuda.get_sync_debug_mode()
            if watched:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            try:
                outputs = compute(*inputs, weight)
            finally:
                if watched:
                    torch.cuda.set_sync_debug_mode(mode)
        here.wait_stream(self.stream)
        reads = 0
        for warning in caught or ():
            if "called a synchronizing CUDA operation" in str(warning.message):
                reads += 1
            elif "debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if reads:
            self._refuse(f"the host waits for the device {reads} times in it")
        return outputs

    def capture(self, run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record the kernels that `run` launches, without running them; return a replay function and the outputs.

        Raises:
            RuntimeError: an operation cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads (those that pin memory for a loader) may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = run()
        self.pool = graph.pool()
        return graph.replay, outputs


class CapturedStep:
    """One captured graph, with the tensors that it reads and writes."""

    def __init__(self, owner: StepGraph, compute: Compute, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        views_VBCHW, targets, labels_B = inputs
        views, soft = views_VBCHW.clone(), targets.clone()
        labels = soft if labels_B is targets else labels_B.clone()
        self.inputs = views, soft, labels
        self.weight = torch.zeros((), dtype=torch.float64, device=views_VBCHW.device)
        self._replay, self.outputs = owner.capture(lambda: compute(views, soft, labels, self.weight))
        self.gradients = [(p, p.grad) for p in owner.parameters if p.grad is not None]
        self._last_weight = 0.0

    def replay(self, inputs: Sequence[Tensor], weight: float) -> Outputs:
        """Run the graph on a new batch."""
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        if weight != self._last_weight:
            self.weight.fill_(weight)
            self._last_weight = weight
        self._replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.outputs


def _undo_failed_capture(here: torch.cuda.Stream | None) -> None:
    """Undo what a failed capture leaves behind: its stream as the current one, and random generators in capture."""
    if here is None:
        return
    torch.cuda.set_stream(here)
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())
