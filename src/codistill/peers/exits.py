"""Exits: what copies of a network's later layers make of its intermediate maps; for training only.

At each of E forks a copy of all remaining layers, with parameters of its own, computes pooled features. Up to its fork
an exit is the network itself, so the forks form a comb. A method has the exits' classifiers; neither they nor the exits
are part of what is exported.
Shapes: B batch, C channels, H height, W width, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from codistill.models import build, resolve
from codistill.peers.branch_points import branch_points, exit_points, library_source
from codistill.peers.heads import AveragedHeads, MapHead
from codistill.peers.inputs import Inputs, InputSpec, call_network, dummy_input
from codistill.peers.members import Spec
from codistill.peers.modes import eval_mode
from codistill.peers.shared_trunk import changes_shared_outputs, plain_copy, share_comb
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError


def add_exits(member: SplitMember, spec: Spec, count: int, seed: int, num_classes: int, inputs: InputSpec) -> None:
    """Give a member `count` exits, in place.

    They fork at the starts of the network's last stages: where it names them in `exits_at`, else where its maps shrink.
    A network with one place too few may offer a `further_stage`; the last exit then forks after the last stage and has
    that for itself (the third exit of HSSAKD's ResNets).

    Args:
        member: A network whose head is cut off.
        spec: What it was built from.
        count: Exits E.
        seed: Exit e is initialized from a seed made of (seed, e).
        num_classes: Number of classes.
        inputs: What the network takes; one row is used once, to find what runs before the forks.

    Raises:
        InputError: the network cannot be built again, or has no places for so many exits.
    """
    if isinstance(spec, nn.Module):
        raise InputError("exits are built from a name or a callable; a built model cannot have them")
    if isinstance(member.head, MapHead | AveragedHeads):
        raise InputError(
            f"--model: {type(member.body).__name__} cannot have exits, as its head is not called on pooled features; "
            "take another network"
        )
    factory = resolve(spec) if isinstance(spec, str) else spec
    example = inputs.for_network(member)
    forks, after = find_exit_forks(member, factory, count, example)
    networks = []
    for e in range(count):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((seed + (e + 1) * 104_729) % 2**31)
            network = build(factory, **inputs.build_options(num_classes))
            further = network.further_stage() if after[e] else None  # pyrefly: ignore
        network.set_submodule(member.head_path, nn.Identity())
        networks.append(network)
    member.shared_modules = share_comb(member.body, networks, forks, after, example)
    if further is not None:
        networks[-1].set_submodule(forks[-1], nn.Sequential(networks[-1].get_submodule(forks[-1]), further))
    member.exits = nn.ModuleList(networks)
    member.exit_dims = _verify(member, example)


def find_exit_forks(
    member: SplitMember, factory: Callable[..., nn.Module], count: int, example: Inputs
) -> tuple[list[str], list[bool]]:
    """Return the paths at which the exits of a network fork, and of each whether it forks after that module.

    Raises:
        InputError: the network has no places for so many exits.
    """
    declared: Sequence[str] = getattr(member.body, "exits_at", ())
    if declared:
        forks = list(declared)[-count:]
    else:
        source = library_source(factory)
        if source is not None and source.native_size and isinstance(example, Tensor):
            example = dummy_input(member, example.shape[1], source.native_size)
        forks = exit_points(branch_points(member.body, member.head_path, example), count)
    after = [False] * len(forks)
    if forks and len(forks) == count - 1 and callable(getattr(member.body, "further_stage", None)):
        forks, after = [*forks, forks[-1]], [*after, True]
    if len(forks) < count:
        raise InputError(
            f"--model: {type(member.body).__name__} has {len(forks)} places for exits, not {count}; give fewer exits, "
            "another network, or name the modules at which exits begin in its attribute exits_at"
        )
    return forks, after


def _verify(member: SplitMember, example: Inputs) -> tuple[int, ...]:
    """Return the widths of a member's exits, or raise where sharing changes what they compute."""
    with eval_mode(member), torch.no_grad():
        alone = [call_network(plain_copy(network), example) for network in member.exits]
        calls = [partial(call_network, network, example) for network in (member.body, *member.exits)]
        changed = changes_shared_outputs(calls, member.shared_modules)
        with torch.enable_grad():  # in evaluation the exits run for a gradient only
            _, _, *shared = member.forward_with_extras(example)
    for x, y in zip(alone, shared):
        if x.dim() != 2 or changed or (x - y).abs().max() > 1e-3 * x.abs().max():
            raise InputError(
                f"--model: {type(member.body).__name__} cannot have exits, as its later layers change or do not pool "
                "what the earlier ones computed; take another network"
            )
    return tuple(x.shape[1] for x in shared)
