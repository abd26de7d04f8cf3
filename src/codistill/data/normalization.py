"""Choosing the statistics for normalization: those of the set, of ImageNet, given ones, or a pretrained network's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from codistill.config import parse_normalize
from codistill.data.image_set import ImageSet, statistics
from codistill.data.lazy_images import LazyImages
from codistill.utils import InputError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Per-channel mean and deviation of pixels / 255."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def with_normalization(
    data: ImageSet,
    rule: str | None,
    pretrained: dict[str, Statistics | None],
    data_info: Mapping[str, Any] | None = None,
) -> ImageSet:
    """Return the set with the mean and deviation by which a run normalizes its images.

    Args:
        data: A set; its own statistics are estimated on a sample where its images are files.
        rule: The value of --normalize.
        pretrained: For every network that starts from pretrained weights, the statistics that it was trained with, if
            known; used where there is neither `rule` nor `data_info`.
        data_info: The data.json of the run's folder, where there is one already; it has precedence.

    Raises:
        InputError: numbers do not fit the channels, or pretrained networks differ and no rule is given.
    """
    if data_info is not None:
        return replace(data, mean=tuple(data_info["mean"]), std=tuple(data_info["std"]))
    data = _with_note_on_color(data, data.std)
    parsed = parse_normalize(rule)
    if parsed == "imagenet":
        return _with_statistics(data, IMAGENET)
    if isinstance(parsed, tuple):
        return _with_statistics(data, parsed)
    known = {name: found for name, found in pretrained.items() if found is not None}
    if parsed is None and known:
        if len({*known.values()}) > 1:
            raise InputError(
                f"--pretrained: {' and '.join(known)} were trained on images normalized in different ways, and all "
                "peers see the same images; give one with --normalize"
            )
        return _with_statistics(data, next(iter(known.values())))
    if not data.mean and isinstance(data.x_train, LazyImages):
        found = statistics(data.x_train.sample())
        return _with_note_on_color(_with_statistics(data, found), found[1])
    return data


def _with_note_on_color(data: ImageSet, std: tuple[float, ...]) -> ImageSet:
    """Return the set with a message where all of its training images are of one color: `statistics` then returns 1."""
    if not std or {*std} != {1.0}:
        return data
    messages = (*data.provenance.messages, "all training images are of one and the same color")
    return replace(data, provenance=replace(data.provenance, messages=messages))


def _with_statistics(data: ImageSet, found: Statistics) -> ImageSet:
    """Return the set with these statistics; one number is repeated for all channels, three are averaged for gray."""
    values = []
    for numbers in found:
        if data.channels == 1:
            numbers = (round(sum(numbers) / len(numbers), 4),)
        values.append(numbers * data.channels if len(numbers) == 1 else numbers)
    if len(values[0]) != data.channels:
        raise InputError(f"--normalize gives {len(values[0])} means for images of {data.channels} channels")
    return replace(data, mean=values[0], std=values[1])
