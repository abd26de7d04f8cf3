"""Soft labels: label smoothing, mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019).

Every draw depends on (seed, epoch, step) alone, so that a resumed run mixes as the whole one does. All views of a batch
are mixed with the same partners and shares: their labels are the same.
Shapes: V views, B batch, C classes, H height, W width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codistill.config.config import Config

STEPS_AHEAD = 32


def wants_soft_labels(config: Config) -> bool:
    """Say whether any of the options makes labels soft."""
    return config.label_smoothing > 0 or mixes_images(config)


def mixes_images(config: Config) -> bool:
    """Say whether images of a batch are mixed, whose partners come from the whole of it."""
    return bool(config.mixup or config.cutmix)


def mix_batch(
    config: Config, num_classes: int, views_VBCHW: Tensor, labels_B: Tensor, epoch: int, step: int
) -> tuple[Tensor, Tensor]:
    """Return the mixed views and the soft labels, `B x C`."""
    targets_BC = F.one_hot(labels_B, num_classes).to(views_VBCHW.dtype)
    targets_BC = targets_BC * (1 - config.label_smoothing) + config.label_smoothing / num_classes
    if not mixes_images(config):
        return views_VBCHW, targets_BC
    block, place = divmod(step, STEPS_AHEAD)
    size = len(labels_B), *views_VBCHW.shape[-2:]
    draws, partners_SB = _drawn(config.seed, config.mixup, config.cutmix, epoch, block, size, labels_B.device)
    (share, square), partner_B = draws[place], partners_SB[place]
    if square is not None:
        mixed = views_VBCHW.clone(memory_format=torch.preserve_format)
        mixed[..., *square] = views_VBCHW[:, partner_B][..., *square]
    else:
        mixed = views_VBCHW.lerp(views_VBCHW[:, partner_B], 1 - share)
    return mixed, targets_BC.lerp(targets_BC[partner_B], 1 - share)


@lru_cache(maxsize=2)
def _drawn(
    seed: int, mixup: float, cutmix: float, epoch: int, block: int, size: tuple[int, int, int], device: torch.device
) -> tuple[list[tuple[float, list[slice] | None]], Tensor]:
    """Return each step's share and square (none for mixup), and on the device its partners, `steps x B`.

    Of many steps at once: the host waits for a GPU whenever it sends it something.
    """
    draws, partners = [], []
    for step in range(block * STEPS_AHEAD, (block + 1) * STEPS_AHEAD):
        rng = np.random.default_rng((seed, 7_001, epoch, step))
        cut = cutmix > 0 and (not mixup or rng.random() < 0.5)
        strength = cutmix if cut else mixup
        share = float(rng.beta(strength, strength))
        partners.append(rng.permutation(size[0]))
        square = None
        if cut:
            *square, share = cut_square(size[1], size[2], share, rng)
        draws.append((share, square))
    return draws, torch.from_numpy(np.stack(partners)).to(device)


def cut_square(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice, float]:
    """Return the rows and columns that the partner fills, and the share that is left, counted in pixels."""
    side = math.sqrt(1 - share)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(y - half_y, 0), min(y + half_y, height))
    columns = slice(max(x - half_x, 0), min(x + half_x, width))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, 1 - area / (height * width)
