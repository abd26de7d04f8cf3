"""A plain eager training loop, structured like the published code: the reference of the speed benchmark hotpath.py.

Written from a description of that code: NCHW float32, images processed one by one with PIL, a Python loop over members
for every loss and accuracy, 13 reads from the device per step, diversity computed sample by sample.
Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
TRAIN = transforms.Compose(
    [
        transforms.RandomCrop(32, 4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
)
TEST = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def load_batch(images: np.ndarray, transform: transforms.Compose = TRAIN) -> Tensor:
    """Transform images one by one and collate them."""
    return torch.stack([transform(Image.fromarray(image)) for image in images])


class Published(nn.Module):
    """P networks and the two projections of the attention, in one module."""

    def __init__(self, networks: list[nn.Module], feature_dim: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.query = nn.Linear(feature_dim, feature_dim // 8, bias=False)
        self.key = nn.Linear(feature_dim, feature_dim // 8, bias=False)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the lists of logits and of features."""
        features = [network.forward_features(x) for network in self.networks]  # type: ignore[operator]
        return [n.forward_head(f) for n, f in zip(self.networks, features)], features  # type: ignore[operator]


def kl(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL with 1e-7 on the target."""
    target = F.softmax(target / temperature, 1) + 1e-7
    return F.kl_div(F.log_softmax(student / temperature, 1), target, reduction="batchmean") * temperature**2


def accuracy(logits: Tensor, targets: Tensor) -> list[Tensor]:
    """Return top-1 and top-5 of one member."""
    guesses = logits.topk(5, 1)[1].t()
    hits = guesses.eq(targets.view(1, -1).expand_as(guesses))
    return [hits[:k].reshape(-1).float().sum() * 100 / len(targets) for k in (1, 5)]


def train_step(model: Published, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, weight: float) -> float:
    """Do one step of OKDDip: losses and accuracies member by member, each read from the device."""
    logits, features = model(x)
    auxiliary = len(logits) - 1
    queries = torch.stack([model.query(f) for f in features[:-1]], 1)
    keys = torch.stack([model.key(f) for f in features[:-1]], 1)
    attention = torch.softmax(torch.bmm(queries, keys.transpose(1, 2)), -1)
    stacked = torch.stack(logits[:-1], 2)
    ce, distill = x.new_zeros(()), x.new_zeros(())
    read = []
    for a in range(auxiliary):
        target = (stacked * attention[:, a].unsqueeze(1)).sum(2)
        ce = ce + F.cross_entropy(logits[a], y)
        distill = distill + kl(logits[a], target, 3.0)
        read.append(accuracy(logits[a], y)[0].item())
    ce_leader = F.cross_entropy(logits[-1], y)
    kl_leader = kl(logits[-1], stacked.mean(2), 3.0)
    loss = ce + ce_leader + weight * (distill + kl_leader)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ensemble = accuracy(stacked.mean(2), y)
    leader = accuracy(logits[-1], y)
    read += [v.item() for v in (*leader, *ensemble, loss, ce, ce_leader, distill, kl_leader, stacked.mean())]
    return read[-6]


@torch.no_grad()
def evaluate(model: Published, x: Tensor, y: Tensor) -> float:
    """Evaluate one batch: member by member, and diversity sample by sample."""
    logits, _ = model(x)
    for z in logits:
        F.cross_entropy(z, y).item()
        [v.item() for v in accuracy(z, y)]
    probs = [F.softmax(z, 1) for z in logits[:-1]]
    distance = 0.0
    for b in range(len(x)):
        for i in range(len(probs)):
            for j in range(i + 1, len(probs)):
                distance += F.pairwise_distance(probs[i][b : b + 1], probs[j][b : b + 1]).item()
    return distance / len(x)
