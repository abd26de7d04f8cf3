"""Every image in four rotations, for methods that learn from them too (HSSAKD).

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codistill.utils import InputError

NUM_ROTATIONS = 4


def rotate_images(images: Tensor) -> Tensor:
    """Return image b turned counterclockwise by k quarters in row 4 b + k: `... x B x C x H x W` -> `... x 4B x ...`.

    Raises:
        InputError: the images are not square.

    >>> rotate_images(torch.tensor([[[[1, 2], [3, 4]]]]))[1]
    tensor([[[2, 4],
             [1, 3]]])
    """
    height, width = images.shape[-2:]
    if height != width:
        raise InputError(f"images of {height} x {width} cannot be rotated by quarters; make them square")
    channels_last = images.stride(-3) == 1  # kept, as networks in that format would convert the maps
    side = (-3, -2) if channels_last else (-2, -1)
    images = images.movedim(-3, -1) if channels_last else images
    turned = torch.stack([torch.rot90(images, k, side) for k in range(NUM_ROTATIONS)], -4).flatten(-5, -4)
    return turned.movedim(-1, -3) if channels_last else turned
