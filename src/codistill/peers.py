"""Peers: several members that see the same images, as whole networks or as branches on one trunk, over any module.

Shapes: V views (1, or one a peer), P peers, B batch, C classes, D features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from codistill.branch_points import branch_points, default_branch_point
from codistill.config import Config
from codistill.errors import InputError
from codistill.heads import SplitMember, eval_mode, example_for, running_statistics_kept, split_head
from codistill.models import Filled, build, has_weights, resolve
from codistill.models.sources import Source
from codistill.sharing import Entry, Shared, share_until

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


def member_seed(seed: int, member: int) -> int:
    """Return the seed from which one member is initialised."""
    return (seed * 1_000_003 + member * 7_919 + 12_345) % 2**31


def _members(
    specs: Sequence[Spec], seed: int, num_classes: int | None, in_channels: int, image_size: int, first: int = 0
) -> list[SplitMember]:
    """Build member `first + p` from `specs[p]` and its own seed, cut before its head; the random state stays."""
    if not specs:
        raise InputError("0 peers are asked for; give one or more")
    factories = [resolve(spec) if isinstance(spec, str) else spec for spec in specs]
    offers = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    built: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for p, factory in enumerate(factories, first):
            torch.default_generator.manual_seed(member_seed(seed, p))  # torch.manual_seed would touch GPUs too
            built.append(factory if isinstance(factory, nn.Module) else build(factory, **offers))
        if len({id(b) for b in built}) != len(built):
            raise InputError("the same built model is given twice; give every peer one of its own")
        members = [split_head(b, example_for(b, in_channels, image_size)) for b in built]
        for p, (factory, member) in enumerate(zip(factories, members), first):
            if has_weights(factory):  # with one head for all, the members would be copies of each other for ever
                torch.default_generator.manual_seed(member_seed(seed, p))
                for module in member.head.modules():
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()
    return members


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
        spec: A name (see `models.resolve`), a callable that builds one network, or a list of names, callables or
            modules, one a peer.
            Modules are taken as they are and changed: their heads are cut off (`export_member` puts them back).
            A callable is given `num_classes`, `in_channels` and `image_size` if its signature takes them.
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
        members = _members(specs, seed, num_classes, in_channels, image_size, first)
        self.members = nn.ModuleList(members)
        self._check([_num_classes(m) for m in members], num_classes)

    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run every member on its view (or all on the only one); V is 1 or the number of peers."""
        views = self._views(views_VBCHW)
        own_views = views.shape[0] > 1
        if self.runner is not None and self.training:
            return self.runner(views)
        with torch.autocast(views.device.type, self.autocast, enabled=self.autocast is not None):
            pairs = [member(views[p if own_views else 0]) for p, member in enumerate(self.members)]
        return self._stack(pairs, None)

    @torch.no_grad()
    def refresh(self, said: PeerOutputs, views_VBCHW: Tensor, index: int) -> None:
        """Run one member again, with nothing recorded, and put what it says now in the place of what it said."""
        views, member = self._views(views_VBCHW), self.member(index)
        with (
            torch.autocast(views.device.type, self.autocast, enabled=self.autocast is not None),
            running_statistics_kept(member),
        ):
            features_BD, logits_BC = member(views[index if views.shape[0] > 1 else 0])
        said.logits_PBC[index] = logits_BC
        if said.features:
            said.features[index] = features_BD


class BranchPeers(Peers):
    """Branches on one trunk, made from any network: built once a branch, with what comes before the fork shared.

    Args:
        spec: A name, or a callable that builds one network (see `NetworkPeers`).
        num_peers: Number of branches.
        num_classes: Number of classes; default what the network ends in.
        branch_at: Path of the first module that every branch has for itself; several, from the root on, make a tree.
            Default: the network's own `branch_at` (the papers' place), or for a library's network its last stage.
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
        members = _members([spec] * num_peers, seed, num_classes, in_channels, image_size)
        example = example_for(members[0], in_channels, image_size)
        forks = [branch_at] if isinstance(branch_at, str) else list(branch_at)
        forks = forks or [default_fork(spec, members[0], in_channels, image_size)]
        fan_out = list(fan_out) or [num_peers]
        if len(forks) != len(fan_out) or math.prod(fan_out) != num_peers:
            raise InputError(f"--fan-out {fan_out} does not make {num_peers} branches at --branch-at {' '.join(forks)}")
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
        if x.dim() == 4:  # images are square, so where axes 1 and 2 agree and 3 does not, the channels stand last
            return x.mean((1, 2)) if x.shape[1] == x.shape[2] != x.shape[3] else x.mean((2, 3))
        return x if x.dim() == 2 else x.mean(1)

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


def default_fork(spec: Spec, member: SplitMember, in_channels: int, image_size: int) -> str:
    """Return where a network forks if nobody says: its own `branch_at`, or what its maps say for a library's network.

    Maps are looked at in the size that a convolutional network was made for, so that the place is the same in any run.
    """
    own = getattr(member.body, "branch_at", "")
    if isinstance(own, str) and own:
        return own
    factory = resolve(spec) if isinstance(spec, str) else spec
    factory = factory.factory if isinstance(factory, Filled) else factory
    if isinstance(factory, Source) and factory.is_library:
        example = example_for(member, in_channels, factory.native_size or image_size)
        found = default_branch_point(branch_points(member.body, member.head_path, example))
        if found is not None:
            return found
    raise InputError(
        f"--branch-at is needed: {type(member.body).__name__} has no default place to fork "
        "(codistill list branch-points --model NAME shows the places)"
    )


def _num_classes(member: SplitMember) -> int:
    """Return the number of classes that a member's head ends in."""
    return [module for module in member.head.modules() if isinstance(module, nn.Linear)][-1].out_features


def build_peers(
    config: Config, num_classes: int, in_channels: int, image_size: int, members: range | None = None
) -> Peers:
    """Build the peers of a resolved config, or (of networks) only those with the numbers `members`."""
    assert config.peers is not None
    about = {"seed": config.seed, "in_channels": in_channels, "image_size": image_size}
    specs = [resolve(name, config.pretrained, config.weights) for name in config.model]
    if config.topology == "networks":
        members = range(config.peers) if members is None else members
        chosen = [specs[p if len(specs) > 1 else 0] for p in members]
        return NetworkPeers(chosen, len(members), num_classes, first=members.start, **about)
    fork = {"branch_at": config.branch_at, "fan_out": config.fan_out}
    return BranchPeers(specs[0], config.peers, num_classes, **fork, **about)
