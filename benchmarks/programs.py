"""The two programs that hotpath.py compares: codistill's training step, and the reference loop (published_shape.py).

The reference loop runs in its own process with the default memory allocator. Every action returns the CPU seconds of
its process; while one process works, the other waits.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import published_shape as published
from codistill.config.config import Config
from codistill.config.methods import IndependentConfig, MethodConfig, OKDDipConfig
from codistill.data import ImageSet
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.evaluation.metrics import PeerMetrics
from codistill.training.build import build_run
from codistill.training.loaders import test_loader
from codistill.training.run import zero_sums
from codistill.training.step import train_step
from codistill.utils.cpu_memory import keep_freed_memory

Step = Callable[[], object]
WEIGHT = 0.37  # of the distillation loss


def spent(step: Step) -> float:
    """Return the CPU seconds of a step in this process."""
    began = time.process_time()
    step()
    return time.process_time() - began


def images(count: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` random images, `N x 32 x 32 x 3`, and labels of 100 classes."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, count)


class Ours:
    """A method x 4 ResNet-32 as `codistill train` runs it: its loader, step, guard, sums and evaluation."""

    def __init__(self, dtype: str = "float32", batch: int = 128, method: MethodConfig | None = None) -> None:
        x, y = images()
        classes = tuple(map(str, range(100)))
        test = x[:batch], y[:batch]
        data = ImageSet("random", x, y, *test, classes, mean=published.MEAN, std=published.STD)
        method = method or OKDDipConfig(variant="okddip_code")
        options: Any = {"dtype": dtype, "batch_size": batch, "protocol": "paper", "device": "cpu"}
        self.t = build_run(Config(method, "resnet32", "random", peers=4, **options).resolved(), data=data)
        self.t.progress.sums = zero_sums(self.t)
        self.t.peers.train()
        self.views, self.targets = next(self.t.loader.epoch(0))
        self.test = test_loader(self.t)

    def augment(self) -> None:
        """Make one batch, including the random numbers of an epoch of 4 batches."""
        next(self.t.loader.epoch(0))

    def step(self) -> float:
        """Do one training step; its loss."""
        return float(train_step(self.t, self.views, self.targets, WEIGHT)["loss"])

    def fold(self) -> None:
        """Fold for evaluation, which is done once per epoch."""
        self.t.peers.eval()
        with torch.inference_mode():
            self.folded = folded_for_evaluation(self.t.peers, self.test.sample_batch()[0][:2])
        self.t.peers.train()

    def evaluate(self) -> None:
        """Evaluate 128 images: all metrics of the members, the ensemble and diversity."""
        metrics = PeerMetrics(4, 100, self.t.method.group, "cpu")
        with torch.inference_mode():
            for views, targets in self.test.epoch():
                outputs = self.folded(views)
                metrics.update(outputs.logits_PBC, targets, self.t.method.ensemble(outputs))


class Theirs:
    """The same networks and weights in the reference loop."""

    def __init__(self, ours: Ours) -> None:
        peers, method = ours.t.peers, ours.t.method
        networks = [peers.export_member(p).to(memory_format=torch.contiguous_format) for p in range(4)]
        self.model = published.Published(networks, 64).to(ours.views.dtype)
        self.model.query.load_state_dict(method.query.state_dict())
        self.model.key.load_state_dict(method.key.state_dict())
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, 0.0, 5e-4, True)
        self.x, self.y = ours.views[0].contiguous(), ours.targets
        self.images, _ = images()

    def augment(self) -> None:
        """Make one batch."""
        published.load_batch(self.images[: len(self.y)])

    def step(self) -> float:
        """Do one training step; its loss."""
        self.model.train()
        return published.train_step(self.model, self.optimizer, self.x, self.y, WEIGHT)

    def evaluate(self) -> None:
        """Evaluate 128 images."""
        self.model.eval()
        published.evaluate(self.model, published.load_batch(self.images[: len(self.y)], published.TEST), self.y)


def independent() -> Ours:
    """Return peers that are trained independently."""
    return Ours(method=IndependentConfig())


def prepare(keep: bool) -> None:
    """Set up this process: one thread, and with `keep`, freed memory is kept as in `codistill train`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if keep:
        keep_freed_memory()


def _program_main(pipe: Connection, keep: bool, program: str) -> None:
    """Build a program and run the actions that the pipe names, until it sends None."""
    prepare(keep)
    built = Theirs(Ours()) if program == "theirs" else Ours()
    while (name := pipe.recv()) is not None:
        pipe.send(spent(getattr(built, name)))


class ProgramProcess:
    """A program in its own process.

    Args:
        program: `theirs` or `ours`.
        keep: Whether it keeps freed memory.
    """

    def __init__(self, program: str, keep: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_program_main, args=(other, keep, program), daemon=True)
        self.process.start()

    def spent(self, name: str) -> float:
        """Return the CPU seconds of an action."""
        self.pipe.send(name)
        return self.pipe.recv()

    def end(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()
