"""Peers: several members that see the same inputs, as whole networks or as branches on one trunk, over any module.

An input is a tensor, or a mapping or tuple of tensors (see codistill.peers.inputs). All peers see one, or each its own
view: a list with one input per peer, or for tensors one more axis in front.
Shapes: V views (1, or one per peer), P peers, Q others, B batch, C classes, D features, E exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from codistill.peers.inputs import Inputs, Views
from codistill.peers.maps import MapShape
from codistill.peers.modes import copy_module
from codistill.peers.shared_trunk import plain_copy
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError


@dataclass
class PreviousOutputs:
    """Outputs for the images of the step before, in their second view."""

    logits_PBC: Tensor
    old_logits_PBC: Tensor
    """What the peers gave for the first view in the step before, constant."""
    targets_B: Tensor


@dataclass
class PeerOutputs:
    """Outputs of all peers for one batch; the training step adds those of the teachers that the method `needs`.

    >>> outputs = PeerOutputs(torch.zeros(3, 8, 10), [torch.zeros(8, 64)] * 3)
    >>> outputs.logits_PBC.shape, outputs.features[0].shape
    (torch.Size([3, 8, 10]), torch.Size([8, 64]))
    """

    logits_PBC: Tensor
    features: list[Tensor]
    """One `B x D_p` tensor per peer, the input of its classifier head."""
    trunk_BD: Tensor | None = None
    """Pooled map that leaves the shared trunk (branches with one view only)."""
    ema_logits_PBC: Tensor | None = None
    teacher_logits_BC: Tensor | None = None
    hybrid_logits_BC: Tensor | None = None
    """Logits of the network whose weights are the mean of the members' weights."""
    exits: list[list[Tensor]] = field(default_factory=list)
    """One `B x D_e` tensor per peer and exit (see `codistill.peers.exits`), where the peers have exits."""
    others_logits_QPBC: Tensor | None = None
    """Logits of the other members' snapshots for each member's images, Q = P - 1, where every member has its own."""
    maps: list[list[Tensor]] = field(default_factory=list)
    """Maps `B x C x H x W` of every peer's last stages (see `codistill.peers.maps`), where the method needs them."""
    previous: PreviousOutputs | None = None
    """Outputs for the images of the step before; None in the first step, or where the method does not need them."""


class Runner(Protocol):
    """Runs all members of some `Peers` at once in training, on parameters that the members' own are views of."""

    parameters: list[nn.Parameter]

    def __call__(self, views: Views) -> PeerOutputs:
        """Run all members."""
        ...

    def split_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of `parameters` with one entry per parameter of every member."""
        ...

    def join_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the inverse of `split_optimizer`."""
        ...


class Peers(nn.Module):
    """Base of `NetworkPeers`, `BranchPeers` and `TwinPeers`: `members`, one `SplitMember` each."""

    members: nn.ModuleList
    num_classes: int
    num_input_axes: int | None = 4
    """Axes of an input tensor, the batch included; None where an input is a mapping or tuple of tensors."""
    takes_tuple: bool = False
    """Whether an input is a tuple of tensors."""
    autocast: torch.dtype | None = None
    """Dtype of autocast around the members' bodies; None: the autocast of the caller, if any."""
    stacked_runner: Runner | None = None
    """Runs all members as one network in training (see codistill.peers.stacked); None: one after the other."""

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for an optimizer: the members' own, or the stacked ones that those are views of."""
        return list(self.parameters()) if self.stacked_runner is None else self.stacked_runner.parameters

    @property
    def local(self) -> Peers:
        """The members that this process holds: all of them, unless they are distributed over ranks."""
        return self

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

    def hybrid_logits(self, inputs: Inputs, shares_P: Tensor | None = None) -> Tensor:
        """Return the logits of the mean of the members' weights; see `codistill.peers.hybrid_logits`."""
        from codistill.peers.hybrid import hybrid_logits  # which imports this module

        return hybrid_logits(self, inputs, shares_P)

    @property
    def exit_dims(self) -> list[tuple[int, ...]]:
        """Widths of every member's exits; empty where it has none."""
        return [self.member(p).exit_dims for p in range(self.num_peers)]

    @property
    def map_shapes(self) -> list[tuple[MapShape, ...]]:
        """Shapes C, H, W of the maps of every member's last stages; empty where they are not taken."""
        return [tuple(self.member(p).map_shapes.values()) for p in range(self.num_peers)]

    def _set_num_classes(self, head_sizes: Sequence[int], num_classes: int | None) -> None:
        """Set `num_classes`, or raise where the members' heads differ from each other or from what is asked for."""
        if len(set(head_sizes)) > 1 or (num_classes is not None and head_sizes[0] != num_classes):
            sizes = ", ".join(map(str, head_sizes))
            raise InputError(f"--model: the peers end in {sizes} classes; all need {num_classes or 'the same number'}")
        self.num_classes = head_sizes[0]

    def _stack_outputs(self, tuples: Sequence[tuple[Tensor, ...]], trunk_BD: Tensor | None) -> PeerOutputs:
        """Return the outputs of members: features, logits, and the features of the exits or the maps."""
        outputs = PeerOutputs(torch.stack([t[1] for t in tuples]), [t[0] for t in tuples], trunk_BD)
        extras = [list(t[2:]) for t in tuples if len(t) > 2]
        if any(self.map_shapes):
            outputs.maps = extras
        else:
            outputs.exits = extras
        return outputs

    def _as_views(self, inputs: Inputs | list[Inputs]) -> Views:
        """Return the views, one or one per peer; a single input is one view.

        Raises:
            InputError: there is another number of views, or the input is of another kind than the networks take.
        """
        if isinstance(inputs, Tensor):
            if self.num_input_axes not in (inputs.dim(), inputs.dim() - 1):
                self._refuse_tensor(inputs)
            views = inputs.unsqueeze(0) if inputs.dim() == self.num_input_axes else inputs
        else:
            inputs = self.tuples_of(inputs)
            views = inputs if isinstance(inputs, list) else [inputs]
            if self.num_input_axes is None and any(isinstance(view, Tensor) for view in views):
                self._refuse_tensor(next(view for view in views if isinstance(view, Tensor)))
        if len(views) not in (1, self.num_peers):
            raise InputError(f"{len(views)} views for {self.num_peers} peers; give 1, or one per peer")
        return views

    def tuples_of(self, inputs: Any) -> Any:
        """Return inputs with tuples where a `DataLoader` has made lists of the tuples that these peers take."""
        if not self.takes_tuple or not isinstance(inputs, list):
            return inputs
        return tuple(inputs) if all(isinstance(x, Tensor) for x in inputs) else [self.tuples_of(x) for x in inputs]

    def _refuse_tensor(self, inputs: Tensor) -> NoReturn:
        given = f"a tensor of {' x '.join(map(str, inputs.shape)) or 'one number'}"
        if self.num_input_axes is None:
            raise InputError(f"{given} is no input of these peers; give a mapping or tuple like their example")
        raise InputError(
            f"{given} is no input of these peers; give {self.num_input_axes} axes, the batch first, or one more with a "
            "view per peer"
        )

    def export_member(self, index: int) -> nn.Module:
        """Return member `index` as a plain network without any part of the other members."""
        return self.member(index).to_plain_module()

    def without_exits(self) -> Peers:
        """Return these peers, or where they have exits a copy without those."""
        if not any(self.exit_dims):
            return self
        plain = copy_module(self)
        for index in range(self.num_peers):
            member, memo = self.member(index), {}
            plain.members[index] = SplitMember(
                plain_copy(member.body, memo), copy_module(member.head, memo), member.head_path, member.feature_dim
            )
        return plain
