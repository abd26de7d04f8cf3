"""A network of some hundred numbers: checkpoints of a few kB, steps of a millisecond."""

from torch import Tensor, nn


class Tiny(nn.Module):
    """Pooled pixels, a hidden layer with BatchNorm, a classifier."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 6) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(4 * in_channels, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.pool(x_BCHW).flatten(1))).relu())


class Dropping(Tiny):
    """The same with dropout before the classifier."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.norm(self.hidden(self.pool(x_BCHW).flatten(1))).relu()
        return self.head(nn.functional.dropout(hidden, 0.3, self.training))


class OneLayer(nn.Sequential):
    """A convolution and the classifier: there is nothing that branches could have each for itself."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        )


class Smooth(nn.Module):
    """A network without kinks, for finite differences; an exit forks before its second convolution."""

    exits_at = ("second",)

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 4, 3, stride=2), nn.Conv2d(4, 6, 3)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(6, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = self.second(self.norm(self.first(x_BCHW)).tanh()).tanh()
        return self.fc(maps.mean((2, 3)))


def wrapped(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Return the network as a training script may have wrapped it."""
    return nn.DataParallel(Tiny(num_classes, in_channels))
