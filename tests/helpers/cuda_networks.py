"""Networks with what a CUDA graph must reproduce or cannot capture."""

import torch
from torch import nn


class Noisy(nn.Module):
    """A network with dropout."""

    def __init__(self, num_classes: int = 5, in_channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.3, self.training)
        return self.fc(x.mean((2, 3)))


class Reading(Noisy):
    """A network that reads a number back to the host."""

    def forward(self, x):
        scale = x.abs().max().item()
        return super().forward(x / scale)


class Waiting(Noisy):
    """A network that waits for the device in a way that is only seen when it is captured."""

    def forward(self, x):
        if x.is_cuda:
            torch.cuda.synchronize()
        return super().forward(x)
