"""Peers: several members that see the same images, as whole networks or as branches on one trunk, over any module.

Shapes: V views (1, or one a peer), P peers, B batch, C classes, D features.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codistill.config import Config
from codistill.errors import InputError
from codistill.models import resolve
from codistill.sharing import Entry, Shared, plain_copy, share_until

if TYPE_CHECKING:
    from codistill.stacked import StackedPeers

Spec = str | Callable[..., nn.Module] | nn.Module


@dataclass
class PeerOutputs:
    """What the peers say about one batch; the loop fills in what the method `needs`."""

    logits_PBC: Tensor
    features: list[Tensor]
    """One `B x D_p` tensor a peer: what its classifier head takes."""
    trunk_BD: Tensor | None = None
    """Pooled map that leaves the shared trunk (branches with one view only)."""
    ema_logits_PBC: Tensor | None = None
    teacher_logits_BC: Tensor | None = None


class SplitMember(nn.Module):
    """A classifier cut in two: `body` (images -> features) and `head` (features -> logits)."""

    def __init__(self, body: nn.Module, head: nn.Module, head_path: str, feature_dim: int) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.head_path, self.feature_dim = head_path, feature_dim
        self.recompute = False
        """Whether training keeps no activations of the body, and runs it again in the backward."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(features, logits)`. The head runs outside autocast, in its own dtype."""
        if self.recompute and self.training and torch.is_grad_enabled():
            # The second run sees the same draws and batch statistics, and must not record those twice.
            twice = lambda: (nullcontext(), statistics_recorded_already(self.body))  # noqa: E731
            features = checkpoint(self.body, x_BCHW, use_reentrant=False, context_fn=twice)
        else:
            features = self.body(x_BCHW)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            features = features.to(next(self.head.parameters()).dtype)
            return features, self.head(features)

    def merge(self) -> nn.Module:
        """Return a plain, independent copy of the classifier with its head back in its place."""
        plain = plain_copy(self.body)
        plain.set_submodule(self.head_path, copy.deepcopy(self.head))
        return plain


def split_head(model: nn.Module) -> SplitMember:
    """Cut `model` before its classifier head: its own `head_path`, or else its last `nn.Linear`.

    The head is swapped for an identity and called explicitly: no hooks, so it survives torch.compile.

    Raises:
        InputError: the model has no linear layer to split at.
    """
    path = getattr(model, "head_path", None)
    if path is None:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears or linears == [""]:
            raise InputError(f"--model {type(model).__name__} has no nn.Linear inside to take as its classifier head")
        path = linears[-1]
    head = model.get_submodule(path)
    first = next((module for module in head.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise InputError(f'--model {type(model).__name__}: its head_path "{path}" leads to no nn.Linear')
    model.set_submodule(path, nn.Identity())
    return SplitMember(model, head, path, first.in_features)


def member_seed(seed: int, member: int) -> int:
    """Return the seed from which one member is initialised."""
    return (seed * 1_000_003 + member * 7_919 + 12_345) % 2**31


def _build(spec: Spec, seed: int, member: int, num_classes: int | None, in_channels: int) -> nn.Module:
    """Build one member from its own seed, leaving the caller's random state as it was."""
    if isinstance(spec, nn.Module):
        return spec
    factory = resolve(spec) if isinstance(spec, str) else spec
    offers = {"num_classes": num_classes, "in_channels": in_channels}
    accepted = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    known = {"num_classes", *accepted} if open_ended else set(accepted)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(member_seed(seed, member))  # torch.manual_seed would touch GPUs too
        return factory(**{k: v for k, v in offers.items() if k in known and v is not None})


def _build_all(
    specs: Sequence[Spec], seed: int, num_classes: int | None, in_channels: int, first: int = 0
) -> list[nn.Module]:
    """Build member `first + p` from `specs[p]`."""
    if not specs:
        raise InputError("0 peers are asked for; give one or more")
    built = [_build(spec, seed, p, num_classes, in_channels) for p, spec in enumerate(specs, first)]
    if len({id(b) for b in built}) != len(built):
        raise InputError("the same built model is given twice; give every peer one of its own")
    return built


class Peers(nn.Module):
    """What `NetworkPeers` and `BranchPeers` share: `members`, one `SplitMember` each."""

    members: nn.ModuleList
    num_classes: int
    autocast: torch.dtype | None = None
    """Dtype of autocast around the members' bodies, if any."""
    runner: StackedPeers | None = None
    """Runs all members as one network in training (see codistill.stacked); None: one after the other."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what an optimiser steps on: the members' parameters, or the stacked ones that they are views of."""
        return list(self.parameters()) if self.runner is None else self.runner.parameters

    @property
    def num_peers(self) -> int:
        """Number of members."""
        return len(self.members)

    def member(self, index: int) -> SplitMember:
        """Return a member."""
        member = self.members[index]
        assert isinstance(member, SplitMember)
        return member

    @property
    def feature_dims(self) -> list[int]:
        """Width of every member's features."""
        return [self.member(p).feature_dim for p in range(self.num_peers)]

    @property
    def trunk_dim(self) -> int | None:
        """Width of the pooled trunk, where the members share one."""
        return None

    def _check(self, sizes: Sequence[int], num_classes: int | None) -> None:
        """Check that the heads that were found agree on the classes."""
        if len(set(sizes)) > 1 or (num_classes is not None and sizes[0] != num_classes):
            ends = ", ".join(map(str, sizes))
            raise InputError(f"--model: the peers end in {ends} classes; all need {num_classes or 'the same number'}")
        self.num_classes = sizes[0]

    def _stack(self, pairs: list[tuple[Tensor, Tensor]], trunk_BD: Tensor | None) -> PeerOutputs:
        return PeerOutputs(torch.stack([z for _, z in pairs]), [f for f, _ in pairs], trunk_BD)

    def _views(self, views: Tensor) -> Tensor:
        """Accept `V x B x C x H x W`, or `B x C x H x W` as one view."""
        views = views.unsqueeze(0) if views.dim() == 4 else views
        if views.shape[0] not in (1, self.num_peers):
            raise InputError(f"{views.shape[0]} views for {self.num_peers} peers; give 1, or one a peer")
        return views

    def export_member(self, index: int) -> nn.Module:
        """Return member `index` as a plain network that stands alone."""
        return self.member(index).merge()


class NetworkPeers(Peers):
    """Whole networks as peers; they may differ in size and kind.

    Args:
        spec: A built-in name, a callable that builds one network, or a list of names, callables or modules, one a peer.
            Modules are taken as they are and changed: their heads are cut off (`export_member` puts them back).
            A callable is given `num_classes` and `in_channels` if its signature takes them.
        num_peers: Number of members, the leader included; default the length of the list.
        num_classes: Number of classes; default what the networks end in.
        seed: Member p is initialised from a seed made of (seed, p).
        in_channels: Channels of the images.
        image_size: Height and width used once, to check the networks.
        first: Number of the first member, where these are a part of more peers (see `mesh.py`).

    Raises:
        InputError: one built instance is given for several peers, or the heads do not agree.

    >>> peers = NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8)
    >>> peers(torch.zeros(4, 3, 8, 8)).logits_PBC.shape
    torch.Size([2, 4, 10])
    """

    def __init__(
        self,
        spec: Spec | Sequence[Spec],
        num_peers: int | None = None,
        num_classes: int | None = None,
        *,
        seed: int = 0,
        in_channels: int = 3,
        image_size: int = 32,
        first: int = 0,
    ) -> None:
        super().__init__()
        specs: list[Spec] = [spec] if isinstance(spec, str | nn.Module) or callable(spec) else list(spec)
        num_peers = len(specs) if num_peers is None else num_peers
        if len(specs) == 1 and num_peers > 1:
            if isinstance(specs[0], nn.Module):
                raise InputError("one built model cannot be several peers; give a name, a callable or a list of models")
            specs *= num_peers
        if len(specs) != num_peers:
            raise InputError(f"{len(specs)} models are given for {num_peers} peers; give one, or one a peer")
        members = [split_head(b) for b in _build_all(specs, seed, num_classes, in_channels, first)]
        self.members = nn.ModuleList(members)
        example = _example(self, in_channels, image_size)
        self._check([_try(m, example) for m in members], num_classes)

    def forward(self, views_VBCHW: Tensor, only: int | None = None) -> PeerOutputs:
        """Run every member on its view (or all on the only one).

        Args:
            views_VBCHW: Images; V is 1 or the number of peers.
            only: The one member that is trained now: the others get no gradient, and their running statistics stay.
        """
        views = self._views(views_VBCHW)
        own_views = views.shape[0] > 1
        if self.runner is not None and self.training and only is None:
            return self.runner(views)
        pairs = []
        with torch.autocast(views.device.type, self.autocast, enabled=self.autocast is not None):
            for p, member in enumerate(self.members):
                x_BCHW = views[p if own_views else 0]
                if only in (None, p):
                    pairs.append(member(x_BCHW))
                else:
                    with torch.no_grad(), running_statistics_kept(member):
                        pairs.append(member(x_BCHW))
        return self._stack(pairs, None)


class BranchPeers(Peers):
    """Branches on one trunk, made from any network: built once a branch, with what comes before the fork shared.

    Args:
        spec: A built-in name, or a callable that builds one network (see `NetworkPeers`).
        num_peers: Number of branches.
        num_classes: Number of classes; default what the network ends in.
        branch_at: Path of the first module that every branch has for itself; several, from the root on, make a tree.
            Default: the network's own `branch_at` (the papers' place).
        fan_out: Number of children at each fork; its product is `num_peers`.
        rescale: Divide the gradient that goes from a fork into the layers below by the fork's fan-out.
        seed: Branch p is initialised from a seed made of (seed, p); shared parts come from the first branch of a group.
        in_channels: Channels of the images.
        image_size: Height and width used once, to find what runs before the fork.

    Raises:
        InputError: the network is an instance, has no such module, or uses a module on both sides of the fork.

    >>> peers = BranchPeers("resnet32", num_peers=4, num_classes=100)
    >>> sum(p.numel() for p in peers.parameters())
    1553248
    """

    def __init__(
        self,
        spec: Spec,
        num_peers: int,
        num_classes: int | None = None,
        *,
        branch_at: str | Sequence[str] = (),
        fan_out: Sequence[int] = (),
        rescale: bool = False,
        seed: int = 0,
        in_channels: int = 3,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if not isinstance(spec, str) and (isinstance(spec, nn.Module) or not callable(spec)):
            raise InputError(
                "branches are built from a name or a callable, once each; a built model or a list cannot be"
            )
        built = _build_all([spec] * num_peers, seed, num_classes, in_channels)
        forks = [branch_at] if isinstance(branch_at, str) else list(branch_at)
        forks = forks or [getattr(built[0], "branch_at", "")]
        if forks == [""]:
            raise InputError(f"--branch-at is needed: {type(built[0]).__name__} has no default place to fork")
        fan_out = list(fan_out) or [num_peers]
        if len(forks) != len(fan_out) or math.prod(fan_out) != num_peers:
            raise InputError(f"--fan-out {fan_out} does not make {num_peers} branches at --branch-at {' '.join(forks)}")
        members = [split_head(b) for b in built]
        example = _example(members[0], in_channels, image_size)
        _try(members[0], example)
        share_until([m.body for m in members], forks, fan_out, example)
        self.members = nn.ModuleList(members)
        # Found once: walking the tree of modules at every step would cost more than a small branch.
        self._shared = [m for m in self.modules() if isinstance(m, Shared)]
        first = members[0].body.get_submodule(forks[0])
        first = first.inner if isinstance(first, Shared) else first
        assert isinstance(first, Entry)
        self._entries = [first, *(m for m in self.modules() if isinstance(m, Entry) and m is not first)]
        with eval_mode(self):
            with torch.no_grad():
                outputs, unshared = self(example), self(example.expand(num_peers, *example.shape))
                gap = (outputs.logits_PBC - unshared.logits_PBC).abs().max()
                if gap > 1e-3 * unshared.logits_PBC.abs().max() or self._writes_into_trunk(example):
                    raise InputError(
                        f'--branch-at "{forks[0]}": the network changes its trunk in place for every branch; '
                        "fork at another module, or build it with inplace=False"
                    )
            self._rescalable = self._rescaling_is_whole(example)
        assert outputs.trunk_BD is not None
        self._check([outputs.logits_PBC.shape[-1]], num_classes)
        self._trunk_dim = outputs.trunk_BD.shape[1]
        self.set_rescale(rescale)

    @property
    def trunk_dim(self) -> int | None:
        """Number of channels where the trunk forks."""
        return self._trunk_dim

    def set_rescale(self, rescale: bool) -> None:
        """Switch the rescaling of gradients at the forks on or off.

        Raises:
            InputError: some of what the branches take goes past the forks' modules (a skip connection, say).
        """
        if rescale and not self._rescalable:
            raise InputError(
                "--branch-at: a path goes past the fork's module and would not be rescaled; fork elsewhere"
            )
        for entry in self._entries:
            entry.rescale = rescale

    def _forget(self) -> None:
        for module in (*self._shared, *self._entries):
            module.forget()

    def _writes_into_trunk(self, example: Tensor) -> bool:
        """Say whether a member changes in place what a shared module has given to all, even to the same values."""
        self._forget()
        versions: dict[int, int] = {}
        written = False
        for member in self.members:
            for shared in self._shared:
                shared.rewind(keep=True)
            member(example)
            for tensor in (t for shared in self._shared for t in shared.tensors()):
                written |= versions.setdefault(id(tensor), tensor._version) != tensor._version
        self._forget()
        return written

    def _rescaling_is_whole(self, example: Tensor) -> bool:
        """Say whether all gradient of what k members share comes through forks that divide it by k in the end."""
        holders = Counter(id(p) for member in self.members for p in member.parameters())
        parameters = [p for p in self.parameters() if p.requires_grad]
        slopes = []
        for rescale in (False, True):
            for entry in self._entries:
                entry.rescale = rescale
            with torch.enable_grad():
                loss = self(example).logits_PBC.square().sum()
                slopes.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        found = [(p, *pair) for p, *pair in zip(parameters, *slopes) if pair[0] is not None]
        noise = 1e-5 * max(plain.abs().max() for _, plain, _ in found)
        gaps = (
            (scaled * holders[id(p)] - plain).abs().max() > 1e-3 * plain.abs().max() + noise
            for p, plain, scaled in found
        )
        return not any(gaps)

    def _trunk_output(self) -> Tensor:
        """Return what entered the first fork in this forward, pooled to `B x D`."""
        x = self._entries[0].seen
        assert x is not None
        return x if x.dim() == 2 else x.mean((2, 3)) if x.dim() == 4 else x.mean(1)

    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run the trunk once and every branch; with one view a peer, the trunk runs once a view."""
        views = self._views(views_VBCHW)
        own_views = views.shape[0] > 1
        if self.runner is not None and self.training and not own_views:
            return self.runner(views)
        self._forget()
        pairs = []
        with torch.autocast(views.device.type, self.autocast, enabled=self.autocast is not None):
            for p, member in enumerate(self.members):
                for shared in self._shared:
                    shared.rewind(keep=not own_views)
                pairs.append(member(views[p if own_views else 0]))
            trunk = None if own_views else self._trunk_output().to(pairs[0][0].dtype)
        self._forget()
        return self._stack(pairs, trunk)


def build_peers(
    config: Config, num_classes: int, in_channels: int, image_size: int, members: range | None = None
) -> Peers:
    """Build the peers of a resolved config, or (of networks) only those with the numbers `members`."""
    assert config.peers is not None
    about = {"seed": config.seed, "in_channels": in_channels, "image_size": image_size}
    if config.topology == "networks":
        members = range(config.peers) if members is None else members
        specs = [config.model[p if len(config.model) > 1 else 0] for p in members]
        return NetworkPeers(specs, len(members), num_classes, first=members.start, **about)
    fork = {"branch_at": config.branch_at, "fan_out": config.fan_out}
    return BranchPeers(config.model[0], config.peers, num_classes, **fork, **about)


class MeanTeacher(nn.Module):
    """An exponential moving average of peers: phi = min(1 - 1/(g + 1), decay) at step g (PCL, section 3.3).

    While training it normalises by batch statistics and leaves its running ones alone; those are averaged from the
    peers' own, for evaluation.

    Args:
        peers: What is averaged; copied.
        decay: Most that the average keeps of itself.
    """

    def __init__(self, peers: Peers, decay: float) -> None:
        super().__init__()
        self.peers = copy.deepcopy(peers).requires_grad_(False)
        self.decay = decay
        for module in self.peers.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.track_running_stats = False  # in training: batch statistics, nothing recorded

    @torch.no_grad()
    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Return what the averaged peers say; no gradient."""
        return self.peers(views_VBCHW)

    @torch.no_grad()
    def update(self, peers: Peers, step: int) -> None:
        """Average in the peers as they are after step `step`, counted from 0 (which copies them)."""
        keep = min(1.0 - 1.0 / (step + 1), self.decay)
        ours = [*self.peers.trained_parameters(), *(b for b in self.peers.buffers() if b.is_floating_point())]
        theirs = [*peers.trained_parameters(), *(b for b in peers.buffers() if b.is_floating_point())]
        torch._foreach_lerp_(ours, theirs, 1.0 - keep)


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use batch statistics without recording them."""
    tracking = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for m in tracking:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


@contextmanager
def statistics_recorded_already(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm run as ever, down to what it saves for the backward, and move no running statistics."""
    tracking = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in tracking]
    counts = [m.num_batches_tracked for m in tracking if m.training and m.num_batches_tracked is not None]
    for m in tracking:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(tracking, momenta):
            m.momentum = momentum
        if counts:
            torch._foreach_sub_(counts, 1)


def _example(module: nn.Module, in_channels: int, image_size: int) -> Tensor:
    """Return one image of noise that `module` can be tried on, leaving the random state alone."""
    parameter = next(module.parameters())
    noise = torch.linspace(-40.0, 40.0, in_channels * image_size**2).sin()
    return noise.view(1, in_channels, image_size, image_size).to(parameter)


def _try(member: SplitMember, example: Tensor) -> int:
    """Run one image through a member and return the number of classes it ends in."""
    try:
        with eval_mode(member), torch.no_grad():
            return member(example)[1].shape[-1]
    except RuntimeError as error:
        name, shape = type(member.body).__name__, " x ".join(map(str, example.shape[1:]))
        raise InputError(
            f'--model {name} cannot take images of {shape} with "{member.head_path}" as its classifier head '
            f"({str(error).splitlines()[0]}); if that is not its head, name the right one in the attribute head_path"
        ) from error


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put `module` into evaluation mode for a while; every part gets its own mode back."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
