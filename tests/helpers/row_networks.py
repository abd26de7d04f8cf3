"""Networks that do not answer each row of a batch by one row of logits."""

from torch import Tensor, cat, nn


class Pooled(nn.Module):
    """Pooled features and a classifier."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return `B x 8`."""
        return self.conv(x_BCHW).relu().mean((2, 3))


class Halves(Pooled):
    """Takes the two halves of a batch as two views of one image."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.features(x_BCHW).chunk(2)
        return self.fc(first + second)


class EvenOnly(Pooled):
    """Refuses a batch of an odd number of rows."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        assert len(x_BCHW) % 2 == 0
        return self.fc(self.features(x_BCHW))


class Doubled(Pooled):
    """Returns every row twice."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(cat([self.features(x_BCHW)] * 2))


class FixedBatch(Pooled):
    """Works with batches of 25 alone."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.fc(self.features(x_BCHW).view(25, 8))
