"""Batches from image files, decoded and varied by worker processes: ImageNet's usual pipeline.

torchvision's transforms and torch's DataLoader do the work. What a sample looks like depends on (seed, epoch, place in
the epoch, view) alone, so the number of workers, of processes and the batch at which a run is resumed change nothing.
Shapes: N images, V views, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from codistill.data.image_files import ImageFiles
from codistill.data.loader import Augmentation, Loader
from codistill.utils.errors import InputError, MachineError, UnreadableError

CellRef = tuple[int, int, int]
"""Epoch, place in it, and number of the sample that stands there."""
TRIED = 8
"""Images that are decoded for a batch to try things on, and repeated to its size."""


@dataclass
class Decoder(Dataset):
    """What a worker does: read the files of a batch, vary each view by its own draw, put the squares together."""

    files: ImageFiles
    labels: np.ndarray
    augmentation: Augmentation | None
    views: range
    """Numbers of the views that are wanted; view v is drawn alike whichever others there are."""
    seed: int
    skip_corrupt: bool
    vary: v2.Transform | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        drawn = self.augmentation
        if drawn is not None and (drawn.flip or drawn.resized_crop):
            crop = [v2.RandomResizedCrop(self.files.size, antialias=True)] * drawn.resized_crop
            self.vary = v2.Compose([*crop, *[v2.RandomHorizontalFlip()] * drawn.flip])

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, places: list[CellRef]) -> tuple[Tensor, dict[str, str]]:
        """Return `V x B x H x W x C`, uint8, and the files that were replaced (or that end the run), with the reason.

        Errors are values here: what a worker raises arrives as a traceback.
        """
        pixels_VBHWC = np.empty((len(self.views), len(places), *self.files.shape[1:]), dtype=np.uint8)
        unreadable: dict[str, str] = {}
        for b, (epoch, place, index) in enumerate(places):
            image = self._open(index, unreadable)
            if image is None:
                break
            for v, view in enumerate(self.views):
                pixels_VBHWC[v, b] = self._view(image, (self.seed, epoch, place, view))
        return torch.from_numpy(pixels_VBHWC), unreadable

    def _open(self, index: int, unreadable: dict[str, str]) -> Any:
        """Decode a file, or in its place the next one of its class that can be read; None where there is none."""
        try:
            return self.files.open(index)
        except InputError as error:
            unreadable[self.files.path(index)] = str(error)
        members = np.flatnonzero(self.labels == self.labels[index]) if self.skip_corrupt else np.array([], dtype=int)
        here = int(np.searchsorted(members, index))
        for other in (*members[here + 1 :], *members[:here]):
            try:
                return self.files.open(other)
            except InputError as error:
                unreadable[self.files.path(other)] = str(error)
        unreadable[""] = unreadable[self.files.path(index)]  # no image stands in for it: the batch cannot be had
        return None

    def _view(self, image: Any, draw: tuple[int, ...]) -> np.ndarray:
        """Return one view, `H x W x C`, drawn by what `draw` says and without touching anybody's random numbers."""
        if self.vary is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0]))
                image = self.vary(image)
        return self.files.squared(image)


class _Batches(Sampler):
    """The places of each batch's own part, as the loader's main process plans them."""

    def __init__(self) -> None:
        self.planned: Iterable[list[CellRef]] = ()

    def __iter__(self) -> Iterator[list[CellRef]]:
        return iter(self.planned)


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(_worker: int) -> None:
    """Let the main process alone answer signals, which reach a whole process group: it still wants its batches."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _end_workers() -> None:
    """End what decodes when this process ends, as multiprocessing would by a signal that workers leave to others."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes an ended worker for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class FileLoader(Loader):
    """Batches of image files.

    Args:
        files: The files, `N`.
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        workers: Processes that decode; 0 decodes in this one.
        skip_corrupt: Whether a file that cannot be read is replaced by the next one of its class, and counted.
        options: Those of `Loader`.
    """

    def __init__(
        self,
        files: ImageFiles,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        workers: int = 0,
        skip_corrupt: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(labels, mean, std, **options)
        self.files, self.given_labels, self.workers, self.skip_corrupt = files, labels, workers, skip_corrupt
        self._loader: DataLoader | None = None

    def share(self, index: int, parts: int, own_views: range) -> None:
        """Yield from now on part `index` of each batch's images, which alone is decoded, with all of its labels."""
        super().share(index, parts, own_views)
        self._loader = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on.

        Raises:
            UnreadableError: a file cannot be read, and none stands in for it.
            MachineError: a worker was ended.
        """
        order_N, cuts = self._draw(epoch)
        there_N = None if order_N is None else order_N.to(self.device)
        loader = self._started()
        assert isinstance(loader.batch_sampler, _Batches)
        loader.batch_sampler.planned = (self._places(epoch, order_N, self._own(w)) for w in self._windows(start))
        for window, (pixels_VBHWC, unreadable) in zip(self._windows(start), _guarded(loader)):
            self._note(unreadable)
            own = self._own(window)
            batch = {name: draw[self._own_views, own] for name, draw in cuts.items()}
            moved = pixels_VBHWC.to(self.device, non_blocking=True)
            labels_B = self.labels_N[window if there_N is None else there_N[window]]
            yield self._normalised(moved, batch), labels_B

    def first(self) -> Tensor:
        """Return a batch of views to try things on: a few images, repeated to its size."""
        order_N, _ = self._draw(0)
        places = self._places(0, order_N, self._own(next(self._windows(0))))
        pixels_VBHWC, unreadable = self._decoder().__getitems__(places[:TRIED])
        self._note(unreadable)
        repeated = torch.arange(len(places)) % len(places[:TRIED])
        return self._normalised(pixels_VBHWC[:, repeated].to(self.device), {})

    def _decoder(self) -> Decoder:
        everything = range(self.views)
        decoder = Decoder(
            self.files, self.given_labels, self.augmentation, everything[self._own_views], self.seed, self.skip_corrupt
        )
        if decoder.vary is None and not (self.augmentation and self.augmentation.cutout):
            decoder.views = range(1)  # nothing is drawn: all views are one
        return decoder

    def _started(self) -> DataLoader:
        """Return the workers; those of a training set live on from epoch to epoch."""
        if self._loader is not None:
            return self._loader
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # last in, first out: before multiprocessing waits for its children
        loader = DataLoader(
            self._decoder(),
            batch_sampler=_Batches(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: it draws from it at every epoch
            persistent_workers=self.workers > 0 and self.augmentation is not None,
        )
        if self.augmentation is not None:
            self._loader = loader
        return loader

    def _draw(self, epoch: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Draw the epoch's order, and on the device where squares are cut out of views; workers draw the rest."""
        if self.augmentation is None:
            return None, {}
        rng = self._generator(epoch)
        order_N, shape = self._order(rng), (self.num_samples,)
        if not self.augmentation.cutout:
            return order_N, {}
        pairs = [[torch.randint(self.files.size, shape, generator=rng) for _ in "yx"] for _ in range(self.views)]
        cut_y, cut_x = (torch.stack(centres).to(self.device) for centres in zip(*pairs))
        return order_N, {"cut_y": cut_y, "cut_x": cut_x}

    def _places(self, epoch: int, order_N: Tensor | None, own: slice) -> list[CellRef]:
        """Return what a worker must know to make the part `own` of an epoch."""
        places = range(own.start, own.stop)
        numbers = places if order_N is None else order_N[own].tolist()
        return [(epoch, place, number) for place, number in zip(places, numbers)]

    def _note(self, unreadable: dict[str, str]) -> None:
        """Count the files that were replaced, and say the first ones.

        Raises:
            UnreadableError: nothing stands in for one.
        """
        if "" in unreadable:
            raise UnreadableError(unreadable[""])
        for file, reason in unreadable.items():
            if file not in self.skipped:
                self.skipped[file] = reason
                count = len(self.skipped)
                if count <= 5 or str(count).strip("0") == "1":  # then every power of ten
                    said = f"{reason.partition('; ')[0]}; the next one of its class stands in ({count} so far)"
                    warnings.warn(said, stacklevel=3)


def _guarded(loader: DataLoader) -> Iterator[Any]:
    """Yield what the workers make.

    Raises:
        MachineError: one of them was ended, most often for want of memory.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            f"a process that decodes images was ended ({str(error).splitlines()[0].rstrip('. ')}); it may have lacked "
            "memory (of /dev/shm too), so give a smaller --data-workers (0: none), or --batch-size"
        ) from None
