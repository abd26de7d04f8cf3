"""The contract between a method and everything else.

A method is a small `nn.Module`. Its `forward(outputs, targets, weight)` takes what the peers say about a batch and
returns a dict: `loss` (what is stepped on), `loss_P` (each member's own loss; they sum to `loss`), `ce_P` and
`distill_P` (its unweighted parts), and, detached and for inspection only, `targets_PBC` (log-probabilities, softened)
and a method's own weights. It knows no loop, optimiser, device, data set or logger.

Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from codistill.config import MethodConfig
from codistill.losses import sigmoid_ramp
from codistill.peers import PeerOutputs, Peers

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class PeerInfo:
    """What a method may know of the peers when it is built."""

    num_peers: int
    num_classes: int
    feature_dims: tuple[int, ...]
    trunk_dim: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, peers: Peers, seed: int = 0) -> PeerInfo:
        """Read it off built peers."""
        return cls(peers.num_peers, peers.num_classes, tuple(peers.feature_dims), peers.trunk_dim, seed)


class Method(nn.Module):
    """Base of all methods; see the module's docstring for the contract."""

    needs: frozenset[str] = frozenset()
    """What the loop must fill in: features, trunk, views, ema, teacher, holdout."""
    update: Literal["joint", "alternating"] = "joint"
    rescale_trunk: bool = False
    """Whether forks divide the gradient that enters the trunk by their fan-out."""
    weight: float = 1.0
    ramp_epochs: float = 0.0
    citation: ClassVar[str]

    def __init__(self, num_peers: int) -> None:
        super().__init__()
        self.num_peers = num_peers
        self.deployed = 0
        """Index of the member that is deployed, declared before training."""
        self.group = tuple(range(num_peers))
        """The members whose ensemble and diversity are reported (okddip leaves its leader out)."""

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method from its config; a method that needs more of the peers than their number overrides this."""
        return cls(num_peers=info.num_peers, **dataclasses.asdict(config))

    def weight_at(self, epoch: float) -> float:
        """Return the weight of the distillation terms in an epoch, counted from 0."""
        return self.weight * sigmoid_ramp(epoch, self.ramp_epochs)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms of the loss; `weight` multiplies the distillation terms (`weight_at` gives it)."""
        raise NotImplementedError

    def after_step(self, peers: Peers, step: int) -> None:
        """Update the method's own state after an optimiser step."""

    def after_epoch(self, holdout_logits_PNC: Tensor, holdout_targets_N: Tensor) -> None:
        """Solve for the method's own state once an epoch, on the holdout's outputs."""

    def deploy(self, peers: Peers) -> nn.Module:
        """Return the one plain network that is deployed."""
        return peers.export_member(self.deployed)


def join(ce_P: Tensor, distill_P: Tensor, weight: float, **inspect: Any) -> Terms:
    """Put the terms together: `loss_P = ce_P + weight * distill_P`, and the parts; `inspect` is detached."""
    loss_P = ce_P + weight * distill_P
    terms = {"loss": loss_P.sum(), "loss_P": loss_P, "ce_P": ce_P.detach(), "distill_P": distill_P.detach()}
    return terms | {name: value.detach() for name, value in inspect.items() if value is not None}
