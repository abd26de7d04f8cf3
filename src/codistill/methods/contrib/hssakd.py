"""HSSAKD: hierarchical self-supervised augmented distillation, online (Yang, An, Cai, Xu; IJCAI 2021).

Every image is seen in four rotations, rows 4 b + k = rot90(x_b, k). A network p has its own head, z_p, and E exits:
copies of its later stages at the start of each of them, with a classifier of the 4 C joint labels u = 4 y_b + k,
q_{p,e}. With targets constant, T = 3, and KLT(s <- t) = T^2 KL(softmax(t / T) || softmax(s / T)), a mean over rows:

    L_p = CE(z_p[0::4], y) + sum_e CE(q_{p,e}, u)
          + w / (P - 1) sum_{j != p} [ KLT(z_p <- z_j) + sum_e KLT(q_{p,e} <- q_{j,e}) ]

The heads learn labels from the upright rows only, and from each other on all rows. BatchNorm sees all rows. Exits
train the network too: nothing is detached on the way into it. The source has two networks; for more, the mean over the
others is our choice, as are soft labels (class c of a row k becomes joint label 4 c + k). P = 1 has no KL terms: then
it is self-supervised label augmentation with exits (Lee et al., ICML 2020).

`rotations=False` leaves the images upright, and the exits have C classes: mutual learning with deep supervision.
`exits=0` leaves mutual learning on rotated images.
Cost of ResNet-32 with E = 3: a step trains 1,716,772 parameters for each network of 472,756, on 4 times the images.
Shapes: P peers, B images, R rows (4 B or B), C classes, E exits, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from codistill.config import HSSAKDConfig, MethodConfig
from codistill.losses import cross_entropy
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class HSSAKD(Method):
    """Learning joint labels at exits, and from the other peers' exits; see the module's docstring for the equations.

    Args:
        num_peers: Networks P, at least 1.
        exit_dims: Widths of every peer's exits (`Peers.exit_dims`); none where `exits=0`.
        num_classes: Classes C.
        options: The fields of `HSSAKDConfig`.

    Raises:
        InputError: a network has another number of exits.

    >>> outputs = PeerOutputs(torch.zeros(2, 4, 10), [], exits=[[torch.zeros(4, 16)], [torch.zeros(4, 16)]])
    >>> method = HSSAKD(num_peers=2, exit_dims=[(16,), (16,)], num_classes=10, exits=1)
    >>> method(outputs, torch.tensor([3]))["exit_top1_BPE"].shape
    torch.Size([1, 2, 1])
    """

    name = "hssakd"
    citation = "Yang, An, Cai, Xu: Hierarchical Self-supervised Augmented Knowledge Distillation. IJCAI 2021"

    @takes_options(HSSAKDConfig)
    def __init__(
        self, num_peers: int, exit_dims: Sequence[Sequence[int]], num_classes: int, options: HSSAKDConfig
    ) -> None:
        super().__init__(num_peers)
        for widths in exit_dims if options.exits else ():
            if len(widths) != options.exits:
                raise InputError(
                    f"hssakd learns at {options.exits} exits of each network, and a network has {len(widths)}; build "
                    f"the peers with exits={options.exits}, or the method with exits={len(widths)}"
                )
        self.num_exits = options.exits
        self.needs = frozenset(
            ({"exits"} if options.exits else set()) | ({"rotations"} if options.rotations else set())
        )
        self.temperature, self.weight = options.temperature, options.weight
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch
        num_labels = self.rows_per_image * num_classes
        self.classifiers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, num_labels) for width in widths) for widths in exit_dims if options.exits
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; the widths of the exits may differ."""
        return cls(info.num_peers, info.exit_dims, info.num_classes, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `exit_top1_BPE` is the part of an image's rows whose joint label an exit gets right."""
        self.check(outputs)
        z_PRC, count = outputs.logits_PBC, self.rows_per_image
        ce_P = cross_entropy(z_PRC[:, ::count], targets_B)
        distill_P = self.learn_from_others(z_PRC, targets_B.repeat_interleave(count, 0))
        if not self.num_exits:
            return combine_terms(ce_P, distill_P, weight * self.weight)
        joint_R = joint_labels(targets_B, count)
        hard_R = joint_R.argmax(-1) if joint_R.is_floating_point() else joint_R
        hits = []
        for q_PRL in self.classify_exits(outputs):
            ce_P = ce_P + cross_entropy(q_PRL, joint_R)
            distill_P = distill_P + self.learn_from_others(q_PRL, joint_R)
            hits.append((q_PRL.argmax(-1) == hard_R).unflatten(1, (-1, count)).to(ce_P.dtype).mean(-1))
        top1_BPE = torch.stack(hits, -1).transpose(0, 1)
        return combine_terms(ce_P, distill_P, weight * self.weight, exit_top1_BPE=top1_BPE)

    def classify_exits(self, outputs: PeerOutputs) -> list[Tensor]:
        """Return the logits of joint labels of each exit, `P x R x 4C` (`P x R x C` without rotations)."""
        return [
            torch.stack([heads[e](exits[e]) for heads, exits in zip(self.classifiers, outputs.exits)])  # pyrefly: ignore
            for e in range(self.num_exits)
        ]

    def learn_from_others(self, logits_PRC: Tensor, targets_R: Tensor) -> Tensor:
        """Return the divergence of every peer from the others, mean over them, `P`; 0 where there are none."""
        if self.num_peers == 1:
            return logits_PRC.new_zeros(1)
        return self.divergence.pairwise(logits_PRC, logits_PRC.detach(), targets_R) / (self.num_peers - 1)


def joint_labels(targets_B: Tensor, count: int) -> Tensor:
    """Return the labels of class and rotation: u = count y + k of row count b + k.

    Args:
        targets_B: Class numbers `B`, or soft labels `B x C`.
        count: Rotations of each image.

    Returns:
        Labels `count B`, or `count B x count C`.

    >>> joint_labels(torch.tensor([3, 7]), 4)
    tensor([12, 13, 14, 15, 28, 29, 30, 31])
    """
    if not targets_B.is_floating_point():
        return (count * targets_B.unsqueeze(1) + torch.arange(count, device=targets_B.device)).flatten()
    same_KK = torch.eye(count, dtype=targets_B.dtype, device=targets_B.device)
    return torch.einsum("bc,kl->bkcl", targets_B, same_KK).flatten(2).flatten(0, 1)
