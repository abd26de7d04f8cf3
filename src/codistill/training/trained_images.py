"""Notes in the run folder which images were trained on, so that `evaluate` recognizes them."""

from __future__ import annotations

import threading
import warnings

import numpy as np

from codistill.data import ImageFiles, count_known, hash_content, known_hashes
from codistill.runs import RunFolder, has_trained_hashes, write_trained_hashes
from codistill.training.run import Run

SECONDS_TO_END = 60.0
"""Time that hashing may take after the last epoch; then those that are done are written."""


class TrainedImages:
    """Writes the hashes of the images that a run trains on: of images in memory at its start, of files at its end.

    Files are hashed in a thread beside the training, which reads them once more, mostly from the system's cache. Only
    the main rank has one.
    """

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run, self.folder = run, folder
        self.hashes: list[int] = []
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Write the hashes of images in memory, or begin to hash files.

        Raises:
            InputError: the run was begun on other images.
        """
        data, splits = self.run.data, self.run.splits
        indices = np.concatenate([splits.train, splits.holdout])
        is_new = not has_trained_hashes(self.folder.path)
        if data.provenance.placeholder_reason or not (is_new or data.provenance.content_hashes is not None):
            return  # arrays were compared by their checksum
        known = known_hashes(data)
        if known is not None:
            write_trained_hashes(self.folder.path, known[0][indices])
            _warn_of_common_images(known[0][indices], known[1])
        elif isinstance(files := data.x_train, ImageFiles):
            self._thread = threading.Thread(target=self._hash, args=(files[indices],), daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Write what was hashed beside the training."""
        if self._thread is not None:
            self._thread.join(SECONDS_TO_END)
            self.folder.check_in_place()
            write_trained_hashes(self.folder.path, np.array(self.hashes, dtype=np.uint64))

    def stop(self) -> None:
        """Hash no more files."""
        self._ended.set()

    def _hash(self, files: ImageFiles) -> None:
        for index in range(len(files)):
            if self._ended.is_set():
                return
            self.hashes.append(hash_content(files.path(index)))


def _warn_of_common_images(trained: np.ndarray, test: np.ndarray) -> None:
    common = count_known(test, trained)
    if common:
        warnings.warn(
            f"{common:,} of the {len(test):,} test images are training images too (they are the same), so the test "
            "figures are too good; remove them from one part",
            stacklevel=3,
        )
