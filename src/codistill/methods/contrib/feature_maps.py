"""Feature maps compared by their attention, and the modules that fuse and decode them (FFSD).

Shapes: B batch, C channels, H height, W width, N = H W positions, M students.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12
"""Least norm that maps are divided by, as in torch's `normalize`."""
MapShape = tuple[int, int, int]
"""C, H, W."""


def attention_map(maps_BCHW: Tensor) -> Tensor:
    """Return A(F) = mean_c F^2, `B x N`.

    >>> attention_map(torch.tensor([[[[1.0, 0.0]], [[3.0, 2.0]]]]))
    tensor([[5., 2.]])
    """
    # By the norm, which makes no tensor of the maps' size.
    return torch.linalg.vector_norm(maps_BCHW, dim=1).square().flatten(1) / maps_BCHW.shape[1]


def normalized_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return d(x, y) = (n(x) - n(y))^2, mean over batch and numbers; n flattens each sample and divides by its norm.

    Computed as |n(x)|^2 + |n(y)|^2 - 2 cos(x, y), which makes no normalized copies; n of zeros is 0.

    >>> normalized_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
    tensor(1.)
    """
    axes = tuple(range(1, x.dim()))
    return _distance_of(x, y, *(torch.linalg.vector_norm(maps, dim=axes) for maps in (x, y)))


def distance_with_attention(x_BCHW: Tensor, y_BCHW: Tensor, x_BN: Tensor, y_BN: Tensor) -> Tensor:
    """Return d(x, y) + d(A(x), A(y)) of maps and their attention, which holds the norm of the maps already.

    >>> x, y = torch.randn(2, 3, 8, 4, 4)
    >>> both = distance_with_attention(x, y, attention_map(x), attention_map(y))
    >>> torch.allclose(both, normalized_distance(x, y) + attention_distance(x, y), atol=1e-6)
    True
    """
    channels = x_BCHW.shape[1]
    norms = [(channels * attention.sum(1)).clamp_min(EPS**2).sqrt() for attention in (x_BN, y_BN)]
    return _distance_of(x_BCHW, y_BCHW, *norms) + normalized_distance(x_BN, y_BN)


def _distance_of(x: Tensor, y: Tensor, x_B: Tensor, y_B: Tensor) -> Tensor:
    """Return d(x, y) of tensors whose samples have the norms x_B and y_B."""
    cosine_B = (x * y).sum(tuple(range(1, x.dim()))) / (x_B.clamp_min(EPS) * y_B.clamp_min(EPS))
    squares_B = (x_B > EPS).to(x.dtype) + (y_B > EPS).to(x.dtype)
    return (squares_B - 2 * cosine_B).mean() / x[0].numel()


def attention_distance(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return d(A(x), A(y)); the channels may differ in number."""
    return normalized_distance(attention_map(x_BCHW), attention_map(y_BCHW))


def shifted_attention(attention_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return v = n(a), r = ||a|| and the attention that a student is to have instead.

    With theta the floor(N/3)-th smallest number of v, it is v below theta, r - v above, and r/2 at theta itself:
    (r/2 - v) sign(v - theta) + r/2.

    Args:
        attention_BN: The attention a of another student.

    Returns:
        v `B x N`, r `B x 1`, and the target `B x N`.

    >>> v, r, target = shifted_attention(torch.tensor([[3.0, 0.0, 4.0]]))
    >>> v, r, target
    (tensor([[0.6000, 0.0000, 0.8000]]), tensor([[5.]]), tensor([[4.4000, 2.5000, 4.2000]]))
    """
    r_B1 = attention_BN.norm(dim=1, keepdim=True)
    v_BN = F.normalize(attention_BN, dim=1)
    theta_B1 = v_BN.kthvalue(max(v_BN.shape[1] // 3, 1), dim=1, keepdim=True).values
    return v_BN, r_B1, (r_B1 / 2 - v_BN) * torch.sign(v_BN - theta_B1) + r_B1 / 2


def diversity_distance(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return the distance of a student's attention n(A(x)) from the shifted attention of another, y (constant)."""
    _, _, target_BN = shifted_attention(attention_map(y_BCHW))
    return (F.normalize(attention_map(x_BCHW), dim=1) - target_BN).square().mean()


def shift_maps(maps_BCHW: Tensor) -> Tensor:
    """Return S(F) = F + (target - v) r / C, the same for all channels."""
    v_BN, r_B1, target_BN = shifted_attention(attention_map(maps_BCHW))
    change_BN = (target_BN - v_BN) * r_B1 / maps_BCHW.shape[1]
    return maps_BCHW + change_BN.view(-1, 1, *maps_BCHW.shape[2:])


class Mixer(nn.Sequential):
    """Depthwise 3 x 3, BatchNorm, ReLU, 1 x 1, BatchNorm, ReLU: from some channels to others."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Fusion(nn.Module):
    """Fuses the students' last maps [F_1; ...; F_M] to M, and classifies their mean: u.

    Args:
        channels: Of each student's last maps.
        outputs: Channels of M.
        num_classes: Classes.

    >>> fused_BCHW, logits_BC = Fusion([8, 8], 4, 10)(torch.zeros(2, 16, 5, 5))
    >>> fused_BCHW.shape, logits_BC.shape
    (torch.Size([2, 4, 5, 5]), torch.Size([2, 10]))
    """

    def __init__(self, channels: Sequence[int], outputs: int, num_classes: int) -> None:
        super().__init__()
        self.mixer, self.head = Mixer(sum(channels), outputs), nn.Linear(outputs, num_classes)

    def forward(self, maps_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return M and u."""
        fused_BCHW = self.mixer(maps_BCHW)
        return fused_BCHW, self.head(fused_BCHW.mean((2, 3)))


class Decoder(nn.Module):
    """Makes maps like those of the earlier stages of the last one, by transposed convolutions of stride 2.

    Args:
        shapes: C, H, W of the network's maps, in the order of its stages.
    """

    def __init__(self, shapes: Sequence[MapShape]) -> None:
        super().__init__()
        channels = [shape[0] for shape in reversed(shapes)]
        self.sizes = [shape[1:] for shape in reversed(shapes)][1:]
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, bias=False)
            for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in channels[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps like those of the stages before the last, the latest first."""
        maps = []
        for upsampler, norm, size in zip(self.upsamplers, self.norms, self.sizes):
            assert isinstance(upsampler, nn.ConvTranspose2d)
            x = norm(upsampler(x, output_size=list(size))).relu()
            maps.append(x)
        return maps
