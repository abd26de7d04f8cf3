"""Building members, each from its own seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from codistill.models import build, has_weights, resolve
from codistill.peers.heads import classifier_layers, num_classes_of
from codistill.peers.inputs import InputSpec
from codistill.peers.split_head import SplitMember, split_head
from codistill.utils import InputError

Spec = str | Callable[..., nn.Module] | nn.Module


def member_seed(seed: int, member: int) -> int:
    """Return the seed from which one member is initialized."""
    return (seed * 1_000_003 + member * 7_919 + 12_345) % 2**31


def build_members(
    specs: Sequence[Spec],
    seed: int,
    num_classes: int | None,
    inputs: InputSpec,
    first: int = 0,
    same_start: bool = False,
) -> list[SplitMember]:
    """Build member `first + p` from `specs[p]` and its own seed (or all from member 0's), split before its head.

    The random state of the caller is left as it is.

    Args:
        specs: What builds each member.
        seed: Seed of all.
        num_classes: Number of classes, None for what the networks end in.
        inputs: What the networks take.
        first: Number of the first member.
        same_start: Whether all begin as member 0.
    """
    if not specs:
        raise InputError("0 peers are asked for; give one or more")
    factories = [resolve(spec) if isinstance(spec, str) else spec for spec in specs]
    kwargs = inputs.build_options(num_classes)
    networks: list[nn.Module] = []
    seeds = [member_seed(seed, 0 if same_start else p) for p in range(first, first + len(specs))]
    with torch.random.fork_rng(devices=[]):
        for own_seed, factory in zip(seeds, factories):
            torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would touch GPUs too
            networks.append(factory if isinstance(factory, nn.Module) else build(factory, **kwargs))
        for network in networks:
            if not isinstance(network, nn.Module):
                raise InputError(
                    f"what builds a network returned {type(network).__name__}; it must return an nn.Module"
                )
        if len({id(network) for network in networks}) != len(networks):
            if all(isinstance(factory, nn.Module) for factory in factories):
                raise InputError("the same built model is given twice; give every peer its own")
            raise InputError("what builds a network returned the same one twice; let it build a new one at each call")
        members = [split_head(network, inputs.for_network(network), inputs.advice) for network in networks]
        for own_seed, factory, member in zip(seeds, factories, members):
            if has_weights(factory):  # with the same head too, the members would remain copies of each other
                torch.default_generator.manual_seed(own_seed)
                for layer in classifier_layers(member.head):
                    layer.reset_parameters()  # pyrefly: ignore
    if not same_start:
        _warn_of_copies(members)
    return members


def _warn_of_copies(members: Sequence[SplitMember]) -> None:
    """Warn where all members begin with the same weights though each had a seed of its own."""
    states = [dict(member.named_parameters()) for member in members]
    if len(members) > 1 and all(
        state.keys() == states[0].keys()
        and all(x.device == states[0][name].device and torch.equal(x, states[0][name]) for name, x in state.items())
        for state in states[1:]
    ):
        warnings.warn(
            f"all {len(members)} peers begin with the same weights, so that they stay copies of each other if they see "
            "the same images; leave torch.manual_seed and fixed weights out of what builds the network",
            stacklevel=4,
        )


def num_head_classes(member: SplitMember) -> int:
    """Return the number of classes that a member's head ends in."""
    return num_classes_of(member.head)
