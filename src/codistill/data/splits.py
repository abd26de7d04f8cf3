"""Deterministic splits, balanced over classes: train, validation and, where a method asks, a holdout; test apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codistill.data.class_balance import balanced_part
from codistill.data.image_set import ImageSet
from codistill.utils.errors import InputError

SPLIT_SEED = 20_200  # one for all runs, so that every seed and method trains and is judged on the same images


@dataclass(frozen=True)
class Splits:
    """Indices into the training part of a set."""

    train: np.ndarray
    val: np.ndarray
    holdout: np.ndarray

    def describe(self, data: ImageSet) -> str:
        """Say the sizes in words."""
        parts = [f"{len(self.train):,} train"]
        parts += [f"{len(self.val):,} validation"] if len(self.val) else []
        parts += [f"{len(self.holdout):,} holdout"] if len(self.holdout) else []
        return " / ".join([*parts, f"{len(data.y_test):,} test"])


def make_splits(
    data: ImageSet, val_fraction: float, holdout_fraction: float = 0.0, train_per_class: int | None = None
) -> Splits:
    """Split the training part; see `Config.val_fraction` and `Config.train_per_class`.

    A set's own validation part is taken as it is, or, where `val_fraction` is 0, left aside.

    Raises:
        InputError: a class has too few images for what is asked.
    """
    labels = data.y_train
    everything = np.arange(len(labels))
    own = everything >= len(labels) - data.own_val
    val = own if data.own_val or not val_fraction else balanced_part(labels, val_fraction, SPLIT_SEED)
    train, val = everything[~val], everything[val & (val_fraction > 0)]  # its own, where the set has one
    if train_per_class is not None:
        rng = np.random.default_rng(SPLIT_SEED + 2)
        counts = np.bincount(labels[train], minlength=len(data.classes))
        least = int(counts[counts > 0].min())
        if train_per_class > least:
            raise InputError(f"--train-per-class {train_per_class}: a class has {least} training images only")
        chosen = [rng.permutation(train[labels[train] == label])[:train_per_class] for label in np.unique(labels)]
        train = np.sort(np.concatenate(chosen))
    # Last, out of what the other methods train on: a method that holds images out gets no labels that others lack.
    held = np.zeros(len(train), dtype=bool)
    if holdout_fraction > 0:
        held = balanced_part(labels[train], holdout_fraction, SPLIT_SEED + 1)
    return Splits(train[~held], val, train[held])
