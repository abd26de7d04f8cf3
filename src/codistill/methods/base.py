"""The contract between a method and everything else.

A method is a small `nn.Module`. Its `forward(outputs, targets, weight)` takes what the peers say about a batch and
returns a dict: `loss` (what is stepped on), `loss_P` (each member's own loss; `loss` is their sum, plus what belongs to
no member, such as an ensemble's cross-entropy), `ce_P` and `distill_P` (its unweighted parts), and, detached and for
inspection only, `targets_PBC` (log-probabilities, softened) and a method's own weights. It knows no loop, optimiser,
device, data set or logger.

Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from codistill.config.methods import MethodConfig
from codistill.losses import sigmoid_ramp
from codistill.peers.base import PeerOutputs, Peers
from codistill.utils.errors import InputError

Terms = dict[str, Tensor]

_LACKS = {
    "trunk": ("trunk_BD", "the shared trunk's output; use BranchPeers (--topology branches) with one view"),
    "ema": ("ema_logits_PBC", "the mean teachers' logits; fill PeerOutputs.ema_logits_PBC from a MeanTeacher"),
    "teacher": ("teacher_logits_BC", "a trained teacher; give --method.teacher, or fill PeerOutputs.teacher_logits_BC"),
    "features": ("features", "the peers' features; fill PeerOutputs.features, one B x D tensor a peer"),
}


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

    name: ClassVar[str]
    citation: ClassVar[str]
    update: Literal["joint", "alternating"] = "joint"
    rescale_trunk: bool = False
    """Whether forks divide the gradient that enters the trunk by their fan-out."""
    weight: float = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: float = 0.0
    ema_decay: float = 0.0
    """Most that a mean teacher keeps of itself, for a method that needs one."""
    needs_full_batch: bool = False
    """Whether the loss is more than a mean over samples (statistics of the batch, a draw a batch), so that processes
    that share a batch must each hear all of it."""
    holdout_fraction: float = 0.0
    """Part of the training set that is held out, for a method that needs it."""

    def __init__(self, num_peers: int) -> None:
        super().__init__()
        self.num_peers = num_peers
        self.needs: frozenset[str] = frozenset()
        """What the loop must fill in: features, trunk, views, ema, teacher, holdout."""
        self.deployed = 0
        """Index of the member that is deployed, declared before training."""
        self.group = tuple(range(num_peers))
        """The members whose ensemble and diversity are reported (okddip leaves its leader out)."""

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method from its config; a method that needs more of the peers than their number overrides this."""
        return cls(num_peers=info.num_peers, **dataclasses.asdict(config))

    def weight_at(self, epoch: float) -> float:
        """Return the ramp's value in an epoch, counted from 0."""
        return sigmoid_ramp(epoch, self.ramp_epochs)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms of the loss; `weight` is the ramp's value (`weight_at` gives it)."""
        raise NotImplementedError

    def check(self, outputs: PeerOutputs) -> None:
        """Raise InputError where `outputs` lacks what the method needs, saying how to give it."""
        for need in self.needs & _LACKS.keys():
            name, sentence = _LACKS[need]
            value = getattr(outputs, name)
            if value is None or (need == "features" and len(value) != self.num_peers):
                raise InputError(f"{self.name} needs {sentence}")
        if outputs.logits_PBC.shape[0] != self.num_peers:
            raise InputError(f"{self.name} was built for {self.num_peers} peers, not {outputs.logits_PBC.shape[0]}")

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Return the ensemble's log-probabilities, `B x C`: of the group's mean probabilities, or the method's own."""
        log_probs_PBC = outputs.logits_PBC.log_softmax(-1)
        if len(self.group) < self.num_peers:
            log_probs_PBC = torch.stack([log_probs_PBC[p] for p in self.group])
        return torch.logsumexp(log_probs_PBC, 0).log_softmax(-1)

    def update_on_holdout(self, holdout_logits_PNC: Tensor, holdout_targets_N: Tensor) -> None:
        """Solve for the method's own state once an epoch, on the holdout's outputs."""

    def deploy(self, peers: Peers) -> nn.Module:
        """Return the one plain network that is deployed."""
        return peers.export_member(self.deployed)

    def deploy_ensemble(self, peers: Peers) -> nn.Module:
        """Return the ensemble as one network that gives log-probabilities; it costs what all its members cost."""
        return Ensemble(peers, self)


class Ensemble(nn.Module):
    """Peers and their method, as a network from images to the ensemble's log-probabilities."""

    def __init__(self, peers: Peers, method: Method) -> None:
        super().__init__()
        self.peers, self.method = peers, method

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return `B x C` log-probabilities."""
        return self.method.ensemble(self.peers(x_BCHW))


def join(ce_P: Tensor, distill_P: Tensor, weight: float, *, ce_weight: float = 1.0, **inspect: Any) -> Terms:
    """Put the terms together: `loss_P = ce_weight * ce_P + weight * distill_P`; `inspect` is detached."""
    loss_P = (ce_P if ce_weight == 1.0 else ce_weight * ce_P) + weight * distill_P
    terms = {"loss": loss_P.sum(), "loss_P": loss_P, "ce_P": ce_P.detach(), "distill_P": distill_P.detach()}
    return terms | {name: value.detach() for name, value in inspect.items() if value is not None}
