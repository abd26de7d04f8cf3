"""RandAugment, TrivialAugment and random erasing of batches that are kept on the device.

RandAugment (Cubuk et al., 2020) applies 2 operations of 14 to each image, all at magnitude 9 of 0 to 30. TrivialAugment
(Mueller and Hutter, ICCV 2021, its wide space) applies one at a random magnitude. What the operations do, and their
ranges, are torchvision's (`transforms.v2`), whose functions run on all images of a batch that drew the same operation,
magnitude and sign. Where pixels are moved, its functions move a table of positions once, and images look their pixels
up in it, all of a batch together. Random erasing (Zhong et al., AAAI 2020) sets a rectangle to the mean, as torchvision
does after normalization.
All numbers are drawn on the CPU from the epoch's generator, and no constant is copied to the device for an operation,
so that the host never waits for the device.
Shapes: V views, K operations, B batch, N images of an epoch, H height, W width, C channels, M tables of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

BINS = 31
"""Magnitudes 0 to 30, of which 0 changes the least."""
RAND_AUGMENT_BIN = 9
"""RandAugment's magnitude in torchvision's default."""
ATTEMPTS = 10
"""Rectangles that are drawn until one fits the image."""
AREA, RATIO = (0.02, 0.33), (0.3, 3.3)
"""Random erasing's parts of the image's area, and its ratios of height to width."""


@dataclass(frozen=True)
class Operation:
    """An operation on images `B x C x H x W`, uint8."""

    apply: Callable[[Any, Tensor, float], Tensor]
    """(torchvision's functions, images, magnitude) -> images."""
    magnitudes: tuple[float, ...] = ()
    """Of every bin; empty where there is none."""
    signed: bool = False
    """Whether the magnitude may be negative."""
    moves: bool = False
    """Whether it only moves pixels, and sets those to 0 that come from outside."""


def _affine(shear: Callable[[float], list[float]], move: Callable[[float], list[int]], **center: Any) -> Any:
    return lambda F, x, m: F.affine(x, angle=0.0, translate=move(m), scale=1.0, shear=shear(m), **center)


def _still(_magnitude: float) -> list[Any]:
    return [0, 0]


def _degrees(magnitude: float) -> float:
    return math.degrees(math.atan(magnitude))


def _to(last: float, first: float = 0.0) -> tuple[float, ...]:
    """Return magnitudes from the first to the last, rounded as torchvision's are."""
    return tuple(torch.linspace(first, last, BINS).tolist())


def operations(wide: bool, height: int, width: int) -> list[Operation]:
    """Return the 14 operations, with RandAugment's ranges or TrivialAugment's wide ones.

    >>> len(operations(wide=True, height=32, width=32))
    14
    """
    factors, shears = (_to(0.99), _to(0.99)) if wide else (_to(0.9), _to(0.3))
    moves_x, moves_y = (_to(32.0), _to(32.0)) if wide else (_to(150.0 / 331.0 * width), _to(150.0 / 331.0 * height))
    corner = {"center": [0.0, 0.0]}
    return [
        Operation(lambda F, x, m: x),
        Operation(_affine(lambda m: [_degrees(m), 0.0], _still, **corner), shears, True, True),
        Operation(_affine(lambda m: [0.0, _degrees(m)], _still, **corner), shears, True, True),
        Operation(_affine(_still, lambda m: [int(m), 0]), moves_x, True, True),
        Operation(_affine(_still, lambda m: [0, int(m)]), moves_y, True, True),
        Operation(lambda F, x, m: F.rotate(x, angle=m), _to(135.0 if wide else 30.0), True, True),
        Operation(lambda F, x, m: F.adjust_brightness(x, 1.0 + m), factors, True),
        Operation(lambda F, x, m: F.adjust_saturation(x, 1.0 + m), factors, True),
        Operation(lambda F, x, m: F.adjust_contrast(x, 1.0 + m), factors, True),
        Operation(lambda F, x, m: adjust_sharpness(x, 1.0 + m), factors, True),
        Operation(lambda F, x, m: F.posterize(x, 8 - round(m)), _to(6.0 if wide else 4.0)),
        Operation(lambda F, x, m: F.solarize(x, 255 * m), _to(0.0, first=1.0)),
        Operation(lambda F, x, m: F.autocontrast(x)),
        Operation(lambda F, x, m: F.equalize(x)),
    ]


def adjust_sharpness(images_BCHW: Tensor, factor: float) -> Tensor:
    """Return torchvision's `adjust_sharpness` of uint8 images; that one copies its kernel to the device at every call.

    >>> adjust_sharpness(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8), 2.0).unique().tolist()
    [7]
    """
    channels, output = images_BCHW.shape[1], images_BCHW.float()
    kernel = torch.full((channels, 1, 3, 3), 1.0 / 13.0, device=images_BCHW.device)
    kernel[..., 1, 1] = 5.0 / 13.0
    inside = output[..., 1:-1, 1:-1]
    inside.add_(conv2d(output, kernel, groups=channels).round_().sub_(inside), alpha=1.0 - factor)
    return output.clamp_(0, 255).to(images_BCHW.dtype)


class AutoAugment:
    """RandAugment or TrivialAugment for batches of images.

    Args:
        policy: randaugment or trivialaugment.
        height: H.
        width: W.
    """

    def __init__(self, policy: str, height: int, width: int) -> None:
        self.wide = policy == "trivialaugment"
        self.num_operations = 1 if self.wide else 2
        self.operations = operations(self.wide, height, width)
        self.size = (height, width)
        self.table_of_code: dict[int, int] = {}
        self.positions_MS: Tensor | None = None

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return what is applied to each of `count` images, `K x N`: (operation x 31 + magnitude) x 2 + sign."""
        shape = (self.num_operations, count)
        operation = torch.randint(len(self.operations), shape, generator=rng)
        if self.wide:
            magnitude = torch.randint(BINS, shape, generator=rng)
        else:
            magnitude = torch.full(shape, RAND_AUGMENT_BIN)
        sign = torch.randint(2, shape, generator=rng)
        has_magnitude = torch.tensor([bool(o.magnitudes) for o in self.operations])
        signed = torch.tensor([o.signed for o in self.operations])
        return (operation * BINS + magnitude * has_magnitude[operation]) * 2 + sign * signed[operation]

    def apply(self, pixels_VBHWC: Tensor, drawn_VKB: Tensor) -> Tensor:
        """Return the images, with what was drawn applied in turn.

        Args:
            pixels_VBHWC: uint8 images, which are changed.
            drawn_VKB: From `draw`, on the CPU.
        """
        from torchvision.transforms.v2 import functional as F

        images = pixels_VBHWC.flatten(0, 1).movedim(-1, 1)  # V B x C x H x W, one image after the other
        if self.positions_MS is None:
            self.positions_MS = self._make_tables(F).to(images.device)
        for drawn in drawn_VKB.transpose(0, 1).flatten(1):
            codes = drawn.numpy()
            tables = np.array([self.table_of_code.get(code, -1) for code in codes.tolist()])
            moved = np.flatnonzero(tables >= 0)
            if len(moved):
                index, table = (
                    torch.from_numpy(x).to(images.device, non_blocking=True) for x in (moved, tables[moved])
                )
                images[index] = _look_up(images[index], self.positions_MS[table])
            still = np.flatnonzero(tables < 0)
            for code, members in _groups(codes[still]):
                index = torch.from_numpy(still[members]).to(images.device, non_blocking=True)
                images[index] = self._apply_one(F, images[index], code)
        return images.movedim(1, -1).unflatten(0, pixels_VBHWC.shape[:2])

    def _apply_one(self, F: Any, images_BCHW: Tensor, code: int) -> Tensor:
        operation = self.operations[code // 2 // BINS]
        magnitude = operation.magnitudes[code // 2 % BINS] if operation.magnitudes else 0.0
        return operation.apply(F, images_BCHW, -magnitude if code % 2 else magnitude)

    def _make_tables(self, F: Any) -> Tensor:
        """Return where every pixel comes from, `M x H W`: 1 and more, in rows; 0 for outside. Fills `table_of_code`."""
        height, width = self.size
        positions = torch.arange(1.0, height * width + 1).view(1, 1, height, width)
        bins = range(BINS) if self.wide else [RAND_AUGMENT_BIN]
        tables = []
        for number in (n for n, operation in enumerate(self.operations) if operation.moves):
            for code in ((number * BINS + b) * 2 + sign for b in bins for sign in (0, 1)):
                self.table_of_code[code] = len(tables)
                tables.append(self._apply_one(F, positions, code).flatten().int())
        return torch.stack(tables)


def _look_up(images_BCHW: Tensor, positions_BS: Tensor) -> Tensor:
    """Return images whose pixels come from these positions of theirs, 0 from position 0."""
    index = positions_BS.long().unsqueeze(1).expand(-1, images_BCHW.shape[1], -1)
    return pad(images_BCHW.flatten(2), (1, 0)).gather(2, index).view_as(images_BCHW)


def _groups(codes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield every code and the positions at which it stands; images that stay as they are, are left out."""
    order = np.argsort(codes, kind="stable")
    values, starts = np.unique(codes[order], return_index=True)
    for code, members in zip(values.tolist(), np.split(order, starts[1:])):
        if code // 2 // BINS:
            yield code, members


def draw_erasing(probability: float, count: int, size: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Draw the rectangle that is erased of each of `count` images, of height 0 where there is none, each `N`.

    Args:
        probability: Of an image's having one.
        count: N.
        size: Side of the square images.
        rng: Random numbers.
    """
    area = size * size * torch.empty(ATTEMPTS, count).uniform_(*AREA, generator=rng)
    ratio = torch.empty(ATTEMPTS, count).uniform_(*map(math.log, RATIO), generator=rng).exp()
    height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (height < size) & (width < size)
    first = fits.int().argmax(0, keepdim=True)
    erased = (torch.rand(count, generator=rng) < probability) & fits.any(0)
    height, width = (side.gather(0, first)[0] * erased for side in (height, width))
    top, left = (
        (torch.rand(count, generator=rng) * (size - side + 1)).long().clamp_max(size - 1) for side in (height, width)
    )
    return {"erase_top": top, "erase_left": left, "erase_height": height, "erase_width": width}


def outside_rectangle(draws: dict[str, Tensor], height: int, width: int) -> Tensor:
    """Return a mask `V x B x H x W x 1` that is False in the rectangles of `draw_erasing`.

    >>> draws = {"erase_top": 1, "erase_left": 0, "erase_height": 1, "erase_width": 2}
    >>> outside_rectangle({name: torch.tensor([[value]]) for name, value in draws.items()}, 2, 3)[0, 0, ..., 0].int()
    tensor([[1, 1, 1],
            [0, 0, 1]], dtype=torch.int32)
    """
    inside = []
    for start, length, size in (("top", "height", height), ("left", "width", width)):
        position = torch.arange(size, device=draws["erase_top"].device)
        begin = draws[f"erase_{start}"].unsqueeze(-1)
        inside.append((position >= begin) & (position < begin + draws[f"erase_{length}"].unsqueeze(-1)))
    return ~(inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).unsqueeze(-1)
