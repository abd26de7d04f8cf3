"""VGG networks for small images (Simonyan & Zisserman, 2015) with BatchNorm, as the online-distillation papers have it.

This file imports torch alone: `codistill export` writes it beside the weights, for use without codistill.
Sizes from 8 x 8 up; any number of input channels.
"""

from torch import Tensor, nn


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ending in a max-pool, and a multilayer perceptron as the classifier.

    Args:
        counts: Convolutions per stage.
        num_classes: Classes C.
        in_channels: Channels of the images.
        dropout: Probability with which the classifier's two hidden layers drop a unit.
    """

    head_path = "classifier"  # all three linear layers: the features are the pooled map
    branch_at = "stage5"  # OKDDip, ONE, CL-ILR: a branch is the last stage of 512 channels and the whole classifier
    exits_at = ("stage2", "stage3", "stage4", "stage5")

    def __init__(
        self,
        counts: tuple[int, int, int, int, int],
        num_classes: int = 100,
        in_channels: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_features = 512
        self.stage1 = _stage(in_channels, 64, counts[0])
        self.stage2 = _stage(64, 128, counts[1])
        self.stage3 = _stage(128, 256, counts[2])
        self.stage4 = _stage(256, 512, counts[3])
        self.stage5 = _stage(512, 512, counts[4])
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(512, num_classes),
        )
        _initialize(self)

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Return the pooled features, `B x num_features`."""
        x = self.stage3(self.stage2(self.stage1(x_BCHW)))
        # Of a 32 x 32 image one pixel remains, which the mean does not change.
        return self.stage5(self.stage4(x)).mean((2, 3))

    def forward_head(self, features_BD: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.classifier(features_BD)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits, `B x C`."""
        return self.forward_head(self.forward_features(x_BCHW))


def _stage(in_channels: int, channels: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        # The bias has no effect before BatchNorm; the published networks, and so their parameter counts, include it.
        layers.append(nn.Conv2d(channels if index else in_channels, channels, 3, 1, 1))
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    # Rounding up keeps a map of one pixel (after five pools of 8 x 8); even sizes are not affected.
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True))


def _initialize(model: nn.Module) -> None:
    """Kaiming-normal convolutions (fan-out), linear layers of deviation 0.01, biases 0; BatchNorm keeps its default."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def vgg16(num_classes: int = 100, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """Thirteen convolutions and three linear layers; 15,299,748 parameters at 100 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels, dropout)


def vgg19(num_classes: int = 100, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """Sixteen convolutions and three linear layers; 20,612,004 parameters at 100 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels, dropout)


def vgg16_no_dropout(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """`vgg16` without dropout: what OKDDip's scripts train as whole networks; their branches have 0.5."""
    return vgg16(num_classes, in_channels, dropout=0.0)


def vgg19_no_dropout(num_classes: int = 100, in_channels: int = 3) -> nn.Module:
    """`vgg19` without dropout."""
    return vgg19(num_classes, in_channels, dropout=0.0)
