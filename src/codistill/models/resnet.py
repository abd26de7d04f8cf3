"""ResNets for small images (He et al., 2016, section 4.2), and wide ones, as the online-distillation papers use them.

This file imports torch alone: `codistill export` writes it beside the weights, for use without codistill.
Sizes from 8 x 8 up; any number of input channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution on the shortcut where the size changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions; the output is four times as wide as `channels`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, width: int | None = None) -> None:
        super().__init__()
        width = channels if width is None else width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.shortcut = _shortcut(in_channels, channels * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)).add_(self.shortcut(x)), inplace=True)


class WideBottleneck(Bottleneck):
    """A bottleneck whose inner width is eight times the usual one (base width 512 instead of 64); outputs as usual."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, stride, 8 * channels)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions (fan-out); BatchNorm and Linear keep torch's defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet(nn.Module):
    """A stem of 16 channels, three stages, average pooling and a linear classifier.

    Args:
        block: BasicBlock, Bottleneck or WideBottleneck.
        counts: Blocks per stage.
        num_classes: Classes C.
        in_channels: Channels of the images.
    """

    head_path = "fc"
    branch_at = "layer3"  # OKDDip, ONE, PCL: a branch is the last stage and the classifier
    exits_at = ("layer2", "layer3")  # HSSAKD, L-MCL: an exit has the later stages for itself

    def __init__(self, block: type, counts: tuple[int, int, int], num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.num_features = 16
        self.layer1 = self._stage(block, 16, counts[0], 1)
        self.layer2 = self._stage(block, 32, counts[1], 2)
        self.layer3 = self._stage(block, 64, counts[2], 2)
        self.fc = nn.Linear(self.num_features, num_classes)
        _initialize(self)

    def _stage(self, block: type, channels: int, count: int, stride: int) -> nn.Sequential:
        blocks = []
        for index in range(count):
            blocks.append(block(self.num_features, channels, stride if index == 0 else 1))
            self.num_features = channels * block.expansion
        return nn.Sequential(*blocks)

    def further_stage(self) -> nn.Module:
        """Return one more stage, as deep and as wide as the last and with stride 1 (HSSAKD's last exit)."""
        stage = self._stage(type(self.layer3[0]), 64, len(self.layer3), 1)
        _initialize(stage)
        return stage

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features, `B x num_features`."""
        x = self.relu(self.bn1(self.conv1(x_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean((2, 3))

    def forward_head(self, features_BD: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.fc(features_BD)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.forward_head(self.forward_features(x_BCHW))


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each 3x3 convolution; the shortcut is a bare 1x1 convolution where the size changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map."""
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y)), inplace=True)) + shortcut


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko & Komodakis (2016): depth 6n + 4, widths 16k, 32k, 64k."""

    head_path = "fc"
    branch_at = "layer3"
    exits_at = ("layer2", "layer3")

    def __init__(self, depth: int, widen: int, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        count, rest = divmod(depth - 4, 6)
        assert not rest, "the depth of a wide residual network is 6n + 4"
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.num_features = widths[3]
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(widths[0], widths[1], count, 1)
        self.layer2 = self._stage(widths[1], widths[2], count, 2)
        self.layer3 = self._stage(widths[2], widths[3], count, 2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        _initialize(self)

    @staticmethod
    def _stage(in_channels: int, channels: int, count: int, stride: int) -> nn.Sequential:
        first = PreActBlock(in_channels, channels, stride)
        return nn.Sequential(first, *[PreActBlock(channels, channels, 1) for _ in range(count - 1)])

    def further_stage(self) -> nn.Module:
        """Return one more stage, as deep and as wide as the last and with stride 1."""
        stage = self._stage(self.num_features, self.num_features, len(self.layer3), 1)
        _initialize(stage)
        return stage

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features, `B x num_features`."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x_BCHW))))
        return F.relu(self.bn(x), inplace=True).mean((2, 3))

    def forward_head(self, features_BD: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.fc(features_BD)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.forward_head(self.forward_features(x_BCHW))


def resnet8(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """One basic block per stage: for tests and first tries."""
    return ResNet(BasicBlock, (1, 1, 1), num_classes, in_channels)


def resnet20(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Three basic blocks per stage."""
    return ResNet(BasicBlock, (3, 3, 3), num_classes, in_channels)


def resnet32(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Five basic blocks per stage; 472,756 parameters at 100 classes."""
    return ResNet(BasicBlock, (5, 5, 5), num_classes, in_channels)


def resnet56(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Nine basic blocks per stage."""
    return ResNet(BasicBlock, (9, 9, 9), num_classes, in_channels)


def resnet110(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Twelve bottleneck blocks per stage, as in OKDDip and PCL; 1,170,868 parameters at 100 classes."""
    return ResNet(Bottleneck, (12, 12, 12), num_classes, in_channels)


def resnet110_basic(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Eighteen basic blocks per stage, as in He et al.; 1,736,564 parameters at 100 classes."""
    return ResNet(BasicBlock, (18, 18, 18), num_classes, in_channels)


def wrn20_8(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Two wide bottlenecks per stage, as in OKDDip and PCL; 6,871,220 parameters at 100 classes."""
    return ResNet(WideBottleneck, (2, 2, 2), num_classes, in_channels)


def wrn16_2(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Depth 16, twice as wide; 703,284 parameters at 100 classes."""
    return WideResNet(16, 2, num_classes, in_channels)


def wrn40_2(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """Depth 40, twice as wide; 2,255,156 parameters at 100 classes."""
    return WideResNet(40, 2, num_classes, in_channels)
