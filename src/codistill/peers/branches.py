"""Branches on one trunk as peers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.branch_points import default_fork
from codistill.peers.inputs import Inputs, InputSpec, device_of
from codistill.peers.members import Spec, build_members
from codistill.peers.modes import autocast_of, copy_module, eval_mode
from codistill.peers.shared_trunk import (
    BranchEntry,
    SharedModule,
    changes_shared_outputs,
    channel_axis,
    share_until,
)
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError


class BranchPeers(Peers):
    """Branches on one trunk, made from any network: built once per branch, with all that runs before the fork shared.

    Args:
        spec: A name, or a callable that builds one network (see `NetworkPeers`).
        num_peers: Number of branches.
        num_classes: Number of classes; default what the network ends in.
        branch_at: Path of the first module that every branch has for itself; several, from the root on, make a tree.
            Default: the network's own `branch_at` (the papers' place), or for a library's network its last stage.
        fan_out: Number of children at each fork; its product is `num_peers`.
        rescale: Divide the gradient that goes from a fork into the layers below by the fork's fan-out.
        seed: Branch p is initialized from a seed made of (seed, p); shared parts come from the first branch of a group.
        in_channels: Channels of the images; default 3.
        image_size: Height and width used once, to find what runs before the fork; default 32.
        example: Instead of the two, for any input, as in `NetworkPeers`.

    Raises:
        InputError: the network is an instance, has no such module, or uses a module on both sides of the fork; or it
            does not take the images or the example.

    >>> peers = BranchPeers("resnet32", num_peers=4, num_classes=100)
    >>> sum(p.numel() for p in peers.parameters())
    1553248
    """

    _channel_axis: int | None = None
    """Axis of the trunk's output that holds its channels; None: found from the shape, as images are square."""

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
        in_channels: int | None = None,
        image_size: int | None = None,
        example: Inputs | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(spec, str) and (isinstance(spec, nn.Module) or not callable(spec)):
            raise InputError(
                "branches are built from a name or a callable, once each; a built model or a list cannot be"
            )
        inputs = InputSpec.of(example, in_channels, image_size)
        self.num_input_axes, self.takes_tuple = inputs.num_axes, isinstance(inputs.example, tuple)
        members = build_members([spec] * num_peers, seed, num_classes, inputs)
        row = inputs.for_network(members[0])
        forks = [branch_at] if isinstance(branch_at, str) else list(branch_at)
        forks = forks or [default_fork(spec, members[0], row)]
        self._share(members, forks, list(fan_out) or [num_peers], row)
        if example is not None:
            self._channel_axis = channel_axis(self._entries[0])
        with eval_mode(self):
            outputs = self._verify(forks[0], row)
            self._can_rescale = self._rescales_every_path(row)
        assert outputs.trunk_BD is not None
        self._trunk_dim = outputs.trunk_BD.shape[1]
        self._set_num_classes([outputs.logits_PBC.shape[-1]], num_classes)
        self.set_rescale(rescale)

    def _share(self, members: list[SplitMember], forks: list[str], fan_out: list[int], example: Inputs) -> None:
        """Make `members` share what runs before the forks, and keep the modules that do the sharing."""
        if len(forks) != len(fan_out) or math.prod(fan_out) != len(members):
            raise InputError(
                f"--fan-out {fan_out} does not make {len(members)} branches at --branch-at {' '.join(forks)}"
            )
        share_until([m.body for m in members], forks, fan_out, example)
        self.members = nn.ModuleList(members)
        # Found once: a walk through all modules at every step would cost more than a small branch.
        self.shared_modules = [m for m in self.modules() if isinstance(m, SharedModule)]
        # Every path into a branch leads through an entry; that of the first fork is the first that a forward reaches.
        entries = [m for m in self.modules() if isinstance(m, BranchEntry)]
        first = members[0].body.get_submodule(forks[0])
        first = first.inner if isinstance(first, SharedModule) else first
        self._entries = sorted(entries, key=lambda entry: entry is not first)

    def _verify(self, fork: str, example: Inputs) -> PeerOutputs:
        """Return the outputs for one row, or raise where sharing the trunk changes them."""
        with torch.no_grad():
            outputs, unshared = self(example), self([example] * self.num_peers)
            gap = (outputs.logits_PBC - unshared.logits_PBC).abs().max()
            if gap > 1e-3 * unshared.logits_PBC.abs().max() or self._writes_into_trunk(example):
                raise InputError(
                    f'--branch-at "{fork}": the network changes its trunk in place for every branch; '
                    "fork at another module, or build it with inplace=False"
                )
        return outputs

    @property
    def trunk_dim(self) -> int | None:
        """Number of channels where the trunk forks."""
        return self._trunk_dim

    def set_rescale(self, rescale: bool) -> None:
        """Switch the rescaling of gradients at the forks on or off.

        Raises:
            InputError: a part of the branches' input goes past the forks' modules (through a skip connection, say).
        """
        if rescale and not self._can_rescale:
            raise InputError(
                "--branch-at: a path goes past the fork's module and would not be rescaled; fork elsewhere"
            )
        for entry in self._entries:
            entry.rescale = rescale

    def clear_cache(self) -> None:
        """Drop the outputs and inputs that shared modules and entries keep within one forward."""
        for module in (*self.shared_modules, *self._entries):
            module.clear_cache()

    def trunk_output(self) -> Tensor:
        """Return what entered the first fork in this forward, pooled over all positions to `B x D`.

        Raises:
            InputError: it is no tensor of numbers to pool.
        """
        x = self._entries[0].last_input
        assert x is not None, "the trunk has not run since clear_cache()"
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            kind = f"{x.dtype} of {x.dim()} axes" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"--branch-at: the module takes {kind}, which is no trunk's output; fork at a later one")
        if x.dim() == 2:
            return x
        if self._channel_axis is not None:
            return x.mean([axis for axis in range(1, x.dim()) if axis != self._channel_axis % x.dim()])
        if x.dim() == 4:  # images are square: where axes 1 and 2 agree and 3 does not, the channels are last
            return x.mean((1, 2)) if x.shape[1] == x.shape[2] != x.shape[3] else x.mean((2, 3))
        return x.mean(1)

    def _writes_into_trunk(self, example: Inputs) -> bool:
        """Return whether a member changes a cached output of a shared module in place, even to the same values."""
        written = changes_shared_outputs([partial(m, example) for m in self.members], self.shared_modules)
        self.clear_cache()
        return written

    def _rescales_every_path(self, example: Inputs) -> bool:
        """Return whether rescaling divides every shared parameter's gradient by its number of branches."""
        num_holders = Counter(id(p) for member in self.members for p in member.parameters())
        parameters = [p for p in self.parameters() if p.requires_grad]
        gradients = []
        for rescale in (False, True):
            for entry in self._entries:
                entry.rescale = rescale
            with torch.enable_grad():
                loss = self(example).logits_PBC.square().sum()
                if not loss.requires_grad:  # all is frozen
                    return True
                gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        found = [(p, *pair) for p, *pair in zip(parameters, *gradients) if pair[0] is not None]
        noise = 1e-5 * max(plain.abs().max() for _, plain, _ in found)
        return all(
            (scaled * num_holders[id(p)] - plain).abs().max() <= 1e-3 * plain.abs().max() + noise
            for p, plain, scaled in found
        )

    def forward(self, inputs: Inputs | list[Inputs]) -> PeerOutputs:
        """Run the trunk once and every branch; with one view per peer, the trunk runs once per view.

        Args:
            inputs: What the network takes, or one view per peer, as in `NetworkPeers`.
        """
        views = self._as_views(inputs)
        own_views = len(views) > 1
        if self.stacked_runner is not None and self.training and not own_views:
            return self.stacked_runner(views)
        self.clear_cache()
        pairs = []
        with autocast_of(device_of(views[0]), self.autocast):
            for p, member in enumerate(self.members):
                for shared in self.shared_modules:
                    shared.clear_cache() if own_views else shared.replay()
                pairs.append(member(views[p if own_views else 0]))
            trunk = None if own_views else self.trunk_output().to(pairs[0][0].dtype)
        self.clear_cache()
        return self._stack_outputs(pairs, trunk)


def can_fork(member: SplitMember, fork: str, example: Inputs) -> bool:
    """Return whether branches of a network can share what runs before a module, as `BranchPeers` checks it.

    Args:
        member: The network; it is copied.
        fork: Path of the first module of every branch.
        example: One row that it takes.
    """
    peers = BranchPeers.__new__(BranchPeers)
    Peers.__init__(peers)
    try:
        peers._share([copy_module(member), copy_module(member)], [fork], [2], example)
        with eval_mode(peers):
            peers._verify(fork, example)
    except InputError:
        return False
    return True
