"""Soft labels: label smoothing, mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019).

Every draw depends on (seed, epoch, step) alone, so that a resumed run mixes like an uninterrupted one. All views of a
batch are mixed with the same partners and weights: their labels are the same.
Shapes: V views, B batch, C classes, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEPS_PER_BLOCK = 32
"""Steps that are drawn at once: the host waits for a GPU at every transfer."""


@dataclass
class MixDraws:
    """Draws of one block of steps."""

    weights: list[float]
    """Per step, the weight of an image itself; its partner has the rest."""
    squares: list[tuple[slice, slice] | None]
    """Per step, the rows and columns that the partner fills (CutMix); None for mixup."""
    partners_SB: Tensor
    """Per step S, the partner of each image, on the device."""


@dataclass
class Mixer:
    """Mixes batches and makes their labels soft.

    Args:
        num_classes: Classes C.
        seed: Seed of the draws.
        mixup: Parameter of mixup's Beta distribution; 0: no mixup.
        cutmix: Parameter of CutMix's Beta distribution; 0: no CutMix. With both, each is drawn for half of the steps.
        label_smoothing: Part of every label that is divided equally among all classes.

    >>> views, targets = Mixer(num_classes=2, label_smoothing=0.5)(torch.zeros(1, 1, 3, 8, 8), torch.tensor([1]), 0, 0)
    >>> targets.tolist()
    [[0.25, 0.75]]
    """

    num_classes: int
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    _block: tuple[object, ...] = field(default=(), init=False, repr=False)
    _draws: MixDraws | None = field(default=None, init=False, repr=False)

    @property
    def makes_soft_labels(self) -> bool:
        """Whether any of the options makes labels soft."""
        return self.label_smoothing > 0 or self.mixes_images

    @property
    def mixes_images(self) -> bool:
        """Whether images are mixed with others of the whole batch."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, views_VBCHW: Tensor, labels_B: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the mixed views and the soft labels, `B x C`; of labels `P x B`, where each view has its own images,
        `P x B x C`.
        """
        targets_BC = F.one_hot(labels_B, self.num_classes).to(views_VBCHW.dtype)
        targets_BC = targets_BC * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if not self.mixes_images:
            return views_VBCHW, targets_BC
        number, place = divmod(step, STEPS_PER_BLOCK)
        block = epoch, number, labels_B.shape[-1], *views_VBCHW.shape[-2:], labels_B.device
        if block != self._block or self._draws is None:
            self._block, self._draws = block, self._draw_block(epoch, number, labels_B, *views_VBCHW.shape[-2:])
        draws = self._draws
        weight, square, partner_B = draws.weights[place], draws.squares[place], draws.partners_SB[place]
        if square is not None:
            mixed = views_VBCHW.clone(memory_format=torch.preserve_format)
            mixed[..., *square] = views_VBCHW[:, partner_B][..., *square]
        else:
            mixed = views_VBCHW.lerp(views_VBCHW[:, partner_B], 1 - weight)
        return mixed, targets_BC.lerp(targets_BC[..., partner_B, :], 1 - weight)

    def _draw_block(self, epoch: int, number: int, labels_B: Tensor, height: int, width: int) -> MixDraws:
        weights, squares, partners = [], [], []
        for step in range(number * STEPS_PER_BLOCK, (number + 1) * STEPS_PER_BLOCK):
            rng = np.random.default_rng((self.seed, 7_001, epoch, step))
            cut = self.cutmix > 0 and (not self.mixup or rng.random() < 0.5)
            parameter = self.cutmix if cut else self.mixup
            weight, square = float(rng.beta(parameter, parameter)), None
            partners.append(rng.permutation(labels_B.shape[-1]))
            if cut:
                rows, columns, weight = cut_square(height, width, weight, rng)
                square = rows, columns
            weights.append(weight)
            squares.append(square)
        partners_SB = torch.from_numpy(np.stack(partners)).to(labels_B.device, non_blocking=True)
        return MixDraws(weights, squares, partners_SB)


def cut_square(height: int, width: int, weight: float, rng: np.random.Generator) -> tuple[slice, slice, float]:
    """Return the rows and columns that the partner fills, and the weight of the image itself, by its pixels."""
    side = math.sqrt(1 - weight)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(y - half_y, 0), min(y + half_y, height))
    columns = slice(max(x - half_x, 0), min(x + half_x, width))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, 1 - area / (height * width)
