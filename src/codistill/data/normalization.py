"""By what images are normalised: statistics of the set, of ImageNet, given ones, or a pretrained network's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from codistill.config.checks import parse_normalize
from codistill.data.image_files import ImageFiles
from codistill.data.image_set import ImageSet, statistics
from codistill.utils.errors import InputError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of pixels / 255, a channel each."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(
    data: ImageSet,
    rule: str | None,
    pretrained: dict[str, Statistics | None],
    held: dict[str, Any] | None = None,
) -> ImageSet:
    """Return the set with the statistics by which a run normalises.

    Args:
        data: A set; its own statistics are estimated on a sample where its images are files.
        rule: `Config.normalize`.
        pretrained: For every network that starts from pretrained weights, what it was trained with, if that is known;
            looked at where neither `rule` nor `held` says anything.
        held: What the run's folder holds already (data.json), which goes before all else.

    Raises:
        InputError: numbers do not fit the channels, or pretrained networks differ and no rule is given.
    """
    if held is not None:
        return replace(data, mean=tuple(held["mean"]), std=tuple(held["std"]))
    parsed = parse_normalize(rule)
    if parsed == "imagenet":
        return _with(data, IMAGENET)
    if isinstance(parsed, tuple):
        return _with(data, parsed)
    known = {name: found for name, found in pretrained.items() if found is not None}
    if parsed is None and known:
        if len({*known.values()}) > 1:
            raise InputError(
                f"--pretrained: {' and '.join(known)} were trained on images normalised in different ways, and peers "
                "see the same; say which with --normalize"
            )
        return _with(data, next(iter(known.values())))
    if not data.mean and isinstance(data.x_train, ImageFiles):
        return _with(data, statistics(data.x_train.sample()))
    return data


def _with(data: ImageSet, found: Statistics) -> ImageSet:
    """Return the set with these statistics; one number stands for all channels, colour's mean for gray."""
    values = []
    for numbers in found:
        if data.channels == 1:
            numbers = (round(sum(numbers) / len(numbers), 4),)
        values.append(numbers * data.channels if len(numbers) == 1 else numbers)
    if len(values[0]) != data.channels:
        raise InputError(f"--normalize gives {len(values[0])} means for images of {data.channels} channels")
    return replace(data, mean=values[0], std=values[1])
