"""Deterministic splits of the training part, balanced over classes: training, validation and a method's holdout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codistill.data.class_balance import balanced_part
from codistill.data.image_set import ImageSet
from codistill.utils.errors import InputError

SPLIT_SEED = 20_200  # one for all runs, so that every seed and method trains and is evaluated on the same images


@dataclass(frozen=True)
class Splits:
    """Indices into the training part of a set."""

    train: np.ndarray
    val: np.ndarray
    holdout: np.ndarray

    def describe(self, data: ImageSet) -> str:
        """Describe the sizes in words."""
        parts = [f"{len(self.train):,} train"]
        parts += [f"{len(self.val):,} validation"] if len(self.val) else []
        parts += [f"{len(self.holdout):,} holdout"] if len(self.holdout) else []
        return " / ".join([*parts, f"{len(data.y_test):,} test"])


def make_splits(
    data: ImageSet, val_fraction: float, holdout_fraction: float = 0.0, train_per_class: int | None = None
) -> Splits:
    """Split the training part; see `Config.val_fraction` and `Config.train_per_class`.

    A set's own validation part is used as it is, or not at all where `val_fraction` is 0.

    Raises:
        InputError: a class has fewer images than `train_per_class`.
    """
    labels = data.y_train
    indices = np.arange(len(labels))
    is_own_val = indices >= len(labels) - data.num_val
    is_val = is_own_val if data.num_val or not val_fraction else balanced_part(labels, val_fraction, SPLIT_SEED)
    train, val = indices[~is_val], indices[is_val & (val_fraction > 0)]
    if train_per_class is not None:
        rng = np.random.default_rng(SPLIT_SEED + 2)
        counts = np.bincount(labels[train], minlength=len(data.classes))
        smallest = int(counts[counts > 0].min())
        if train_per_class > smallest:
            raise InputError(
                f"--train-per-class {train_per_class}: a class has only {smallest} training images; "
                f"give {smallest} or less"
            )
        chosen = [rng.permutation(train[labels[train] == label])[:train_per_class] for label in np.unique(labels)]
        train = np.sort(np.concatenate(chosen))
    # Last, from the images that the other methods train on: a method with a holdout sees no labels that others lack.
    is_holdout = np.zeros(len(train), dtype=bool)
    if holdout_fraction > 0:
        is_holdout = balanced_part(labels[train], holdout_fraction, SPLIT_SEED + 1)
    return Splits(train[~is_holdout], val, train[is_holdout])
