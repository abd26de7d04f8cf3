"""Batches of image files, decoded and augmented by worker processes: ImageNet's usual pipeline.

Built on torchvision's transforms and torch's DataLoader. A view of a sample depends on (seed, epoch, position in the
epoch, view) alone, so the number of workers, of processes and the batch at which a run is resumed change nothing.
Shapes: N images, V views, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from codistill.data.decoding_workers import (
    PlannedBatches,
    SampleRef,
    SentBatch,
    check_sendable,
    receive,
    send,
    start_loader,
)
from codistill.data.lazy_images import LazyImages
from codistill.data.loader import Augmentation, Loader, LoaderOptions
from codistill.utils import InputError, UnreadableError, track

if TYPE_CHECKING:
    from torchvision.transforms import v2

NUM_SAMPLE_IMAGES = 8
"""Images that are decoded for a sample batch, and repeated to its size."""


@dataclass
class Decoder(Dataset):
    """The work of a worker: decode the files of a batch, augment each view by its own draw, stack the squares."""

    files: LazyImages
    labels: np.ndarray
    augmentation: Augmentation | None
    views: range
    """Numbers of the views to make; the draw of a view does not depend on the others."""
    seed: int
    skip_corrupt: bool
    transform: v2.Transform | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        augmentation = self.augmentation
        if augmentation is None or not (
            augmentation.flip or augmentation.resized_crop or augmentation.policy != "none"
        ):
            return
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomResizedCrop(self.files.size, antialias=True)] * augmentation.resized_crop
        steps += [v2.RandomHorizontalFlip()] * augmentation.flip
        if augmentation.policy != "none":
            steps.append(v2.RandAugment() if augmentation.policy == "randaugment" else v2.TrivialAugmentWide())
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, samples: list[SampleRef]) -> tuple[SentBatch | np.ndarray, dict[str, str], list[int]]:
        """Return `V x B x H x W x C`, uint8, the files that could not be read, with the reason, and places left out.

        Errors are returned as values: an exception of a worker would arrive as a traceback.
        """
        pixels_VBHWC = np.empty((len(self.views), len(samples), *self.files.shape[1:]), dtype=np.uint8)
        unreadable: dict[str, str] = {}
        bad: list[int] = []
        for b, (epoch, position, index) in enumerate(samples):
            image = self._open_or_replace(index, unreadable)
            if image is None and "" in unreadable:
                break
            if image is None:
                bad.append(b)
                continue
            for v, view in enumerate(self.views):
                pixels_VBHWC[v, b] = self._make_view(image, (self.seed, epoch, position, view))
        return send(np.delete(pixels_VBHWC, bad, 1) if bad else pixels_VBHWC), unreadable, bad

    def _open_or_replace(self, index: int, unreadable: dict[str, str]) -> Any:
        """Decode a file, or with `skip_corrupt` the next readable one of its class; None where there is none.

        Where images are judged (nothing is augmented) none is replaced, as its replacement would count twice.
        """
        try:
            return self.files.open(index)
        except InputError as error:
            unreadable[self.files.path(index)] = str(error)
        if self.skip_corrupt and self.augmentation is None:
            return None
        members = np.flatnonzero(self.labels == self.labels[index]) if self.skip_corrupt else np.array([], dtype=int)
        here = int(np.searchsorted(members, index))
        for other in (*members[here + 1 :], *members[:here]):
            try:
                return self.files.open(other)
            except InputError as error:
                unreadable[self.files.path(other)] = str(error)
        unreadable[""] = unreadable[self.files.path(index)]  # there is no replacement, so the batch cannot be made
        return None

    def _make_view(self, image: Any, draw: tuple[int, ...]) -> np.ndarray:
        """Return one view, `H x W x C`, from a seed made of `draw`; no other random state is used or changed."""
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0]))
                image = self.transform(image)
        return self.files.squared(image)


class FileLoader(Loader):
    """Batches of image files.

    Args:
        files: The images, `N`.
        labels: int64 array `N`.
        mean: Per-channel mean of pixels / 255.
        std: Per-channel deviation.
        options: Options of every loader.
        workers: Processes that decode; 0 decodes in this one.
        skip_corrupt: Whether a file that cannot be read is replaced by the next one of its class, and counted; where
            nothing is augmented, for evaluation, it is left out.
        timeout: Seconds that the workers have for one batch.
    """

    def __init__(
        self,
        files: LazyImages,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        options: LoaderOptions,
        *,
        workers: int = 0,
        skip_corrupt: bool = False,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(labels, mean, std, options)
        self.files, self.workers, self.timeout = files, workers, timeout
        self._decoder_labels, self._skip_corrupt = labels, skip_corrupt
        self._loader: DataLoader | None = None
        if workers:
            check_sendable(self._make_decoder())

    def shard(self, index: int, num_shards: int, local_views: range) -> None:
        """Yield from now on only shard `index` of each batch's images, which alone is decoded; see `Loader.shard`."""
        super().shard(index, num_shards, local_views)
        self._loader = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch number `start` on.

        Raises:
            UnreadableError: a file cannot be read and is not replaced.
            DecodingError: a worker was killed, or no batch came within `timeout` seconds.
            SignalReceived: a signal arrived while a batch was waited for that does not come.
        """
        order_N, draws = self._draw_epoch(epoch)
        device_order_N = None if order_N is None else order_N.to(self.device)
        loader = self._start_workers()
        assert isinstance(loader.batch_sampler, PlannedBatches)
        loader.batch_sampler.planned = (
            self._sample_refs(epoch, order_N, self._local_slice(batch)) for batch in self._batch_slices(start)
        )
        batches = receive(loader, self.timeout)
        slices = [*self._batch_slices(start)]
        shown = track(slices, "decoding batches") if self.options.augmentation is None else slices
        for batch, (pixels_VBHWC, unreadable, bad) in zip(shown, batches):
            self._count_unreadable(unreadable)
            local_draws = {name: d[self._local_views, self._local_slice(batch)] for name, d in draws.items()}
            moved = pixels_VBHWC.to(self.device, non_blocking=True)
            labels_B = self.labels_N[batch if device_order_N is None else device_order_N[batch]]
            if bad:  # of images that are judged
                kept = np.delete(np.arange(len(labels_B)), bad)
                labels_B = labels_B[torch.from_numpy(kept).to(self.device)]
            if not pixels_VBHWC.shape[1]:
                continue
            yield self._normalize(moved, local_draws), labels_B

    def sample_batch(self) -> Tensor:
        """Return a few images, repeated to the size of a batch; see `Loader.sample_batch`."""
        order_N, _ = self._draw_epoch(0)
        samples = self._sample_refs(0, order_N, self._local_slice(next(self._batch_slices(0))))
        pixels, unreadable, _ = self._make_decoder().__getitems__(samples[:NUM_SAMPLE_IMAGES])
        self._count_unreadable(unreadable)
        pixels_VBHWC = torch.as_tensor(pixels)  # no worker: an array
        if not pixels_VBHWC.shape[1]:
            raise UnreadableError(next(iter(unreadable.values())))
        repeated = torch.arange(len(samples)) % pixels_VBHWC.shape[1]
        return self._normalize(pixels_VBHWC[:, repeated].to(self.device), {})

    def _make_decoder(self) -> Decoder:
        augmentation, views = self.options.augmentation, range(self.options.views)[self._local_views]
        labels, seed = self._decoder_labels, self.options.seed
        decoder = Decoder(self.files, labels, augmentation, views, seed, self._skip_corrupt)
        if decoder.transform is None and not (augmentation and (augmentation.cutout or augmentation.erasing)):
            decoder.views = range(1)  # nothing is drawn, so all views are the same
        return decoder

    def _start_workers(self) -> DataLoader:
        """Return the workers' loader; that of a training set is kept from epoch to epoch."""
        if self._loader is not None:
            return self._loader
        pin = self.device.type == "cuda"
        persistent = self.options.augmentation is not None
        loader = start_loader(self._make_decoder(), self.workers, pin_memory=pin, persistent=persistent)
        if persistent:
            self._loader = loader
        return loader

    def _draw_epoch(self, epoch: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Draw the epoch's order, and on the device what is cut out; the workers draw everything else."""
        augmentation = self.options.augmentation
        if augmentation is None:
            return None, {}
        rng = self._generator(epoch)
        order_N = self._order(rng)
        draws = [
            augmentation.draws_for_device(self.files.size, self.num_samples, rng) for _ in range(self.options.views)
        ]
        return order_N, {name: torch.stack([view[name] for view in draws]).to(self.device) for name in draws[0]}

    def _sample_refs(self, epoch: int, order_N: Tensor | None, positions: slice) -> list[SampleRef]:
        """Return the samples at these positions of an epoch."""
        numbers = range(positions.start, positions.stop)
        indices = numbers if order_N is None else order_N[positions].tolist()
        return [(epoch, position, index) for position, index in zip(numbers, indices)]

    def _count_unreadable(self, unreadable: dict[str, str]) -> None:
        """Count the files that were replaced or left out, and warn about the first ones.

        Raises:
            UnreadableError: there is no replacement for one.
        """
        if "" in unreadable:
            raise UnreadableError(unreadable[""])
        for file, reason in unreadable.items():
            if file not in self.skipped:
                self.skipped[file] = reason
                count = len(self.skipped)
                if count <= 5 or str(count).strip("0") == "1":  # then every power of ten
                    cause = reason.partition("; ")[0]
                    judged = self.options.augmentation is None
                    what = "it is left out" if judged else "the next one of its class replaces it"
                    warnings.warn(f"{cause}; {what} ({count} so far)", stacklevel=3)
