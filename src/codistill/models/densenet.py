"""DenseNets for small images (Huang et al., 2017), as the online-distillation papers use them, and the original ones.

This file imports torch alone: `codistill export` writes it beside the weights, for use without codistill.
Sizes from 8 x 8 up; any number of input channels.
"""

import torch
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution to `growth` maps, concatenated to its input.

    Args:
        in_channels: Maps of the input.
        growth: Maps to add.
        bottleneck: Whether a 1x1 convolution to four times `growth` maps comes first.
    """

    def __init__(self, in_channels: int, growth: int, *, bottleneck: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if bottleneck:
            layers += _norm_relu(in_channels)
            layers.append(nn.Conv2d(in_channels, 4 * growth, 1, bias=False))
            in_channels = 4 * growth
        layers += _norm_relu(in_channels)
        layers.append(nn.Conv2d(in_channels, growth, 3, 1, 1, bias=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and the new maps."""
        return torch.cat([x, self.layers(x)], 1)


def _norm_relu(channels: int) -> list[nn.Module]:
    # In place on the output of BatchNorm, never on the input: later layers and other branches read that.
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def _initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions (fan-in), no bias in the classifier; the rest keeps torch's defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


class DenseNet(nn.Module):
    """A convolution, three dense blocks with half the size after each transition, average pooling, a linear classifier.

    Args:
        counts: Dense layers per block.
        num_classes: Classes C.
        in_channels: Channels of the images.
        growth: Maps that each dense layer adds.
        stem: Maps of the first convolution.
        bottleneck: Whether the dense layers start with a 1x1 convolution ("B" of BC).
        compression: Fraction of the maps that a transition keeps ("C" of BC).
    """

    head_path = "fc"
    branch_at = "block3"  # OKDDip, ONE, PCL: a branch is the last dense block, the last BatchNorm and the classifier
    exits_at = ("block2", "block3")

    def __init__(
        self,
        counts: tuple[int, int, int],
        num_classes: int = 100,
        in_channels: int = 3,
        *,
        growth: int = 12,
        stem: int = 24,
        bottleneck: bool = True,
        compression: float = 0.5,
    ) -> None:
        super().__init__()

        def block(count: int) -> nn.Sequential:
            first = self.num_features
            self.num_features += count * growth
            return nn.Sequential(*[DenseLayer(first + i * growth, growth, bottleneck=bottleneck) for i in range(count)])

        def transition() -> nn.Sequential:
            wide, self.num_features = self.num_features, int(self.num_features * compression)
            convolution = nn.Conv2d(wide, self.num_features, 1, bias=False)
            return nn.Sequential(*_norm_relu(wide), convolution, nn.AvgPool2d(2))

        self.num_features = stem
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.block1 = block(counts[0])
        self.transition1 = transition()
        self.block2 = block(counts[1])
        self.transition2 = transition()
        self.block3 = block(counts[2])
        self.bn = nn.BatchNorm2d(self.num_features)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(self.num_features, num_classes)
        _initialize(self)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features, `B x num_features`."""
        x = self.transition1(self.block1(self.conv1(x_BCHW)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.relu(self.bn(x)).mean((2, 3))

    def forward_head(self, features_BD: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.fc(features_BD)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.forward_head(self.forward_features(x_BCHW))


def densenet40_12(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """DenseNet-BC, six layers per block, as in OKDDip and PCL; 188,092 parameters at 100 classes."""
    return DenseNet((6, 6, 6), num_classes, in_channels)


def densenet100_12(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """DenseNet-BC, sixteen layers per block; 800,032 parameters at 100 classes."""
    return DenseNet((16, 16, 16), num_classes, in_channels)


def densenet40_12_plain(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Twelve plain layers per block and no compression (the DenseNet paper's); 1,060,132 parameters at 100 classes."""
    return DenseNet((12, 12, 12), num_classes, in_channels, stem=16, bottleneck=False, compression=1.0)
