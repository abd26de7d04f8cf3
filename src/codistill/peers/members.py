"""Building members, each from its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from codistill.models import build, has_weights, resolve
from codistill.peers.split_head import SplitMember, dummy_input, split_head
from codistill.utils import InputError

Spec = str | Callable[..., nn.Module] | nn.Module


def member_seed(seed: int, member: int) -> int:
    """Return the seed from which one member is initialized."""
    return (seed * 1_000_003 + member * 7_919 + 12_345) % 2**31


def build_members(
    specs: Sequence[Spec],
    seed: int,
    num_classes: int | None,
    in_channels: int,
    image_size: int,
    first: int = 0,
    same_start: bool = False,
) -> list[SplitMember]:
    """Build member `first + p` from `specs[p]` and its own seed (or all from member 0's), split before its head.

    The random state of the caller is left as it is.
    """
    if not specs:
        raise InputError("0 peers are asked for; give one or more")
    factories = [resolve(spec) if isinstance(spec, str) else spec for spec in specs]
    kwargs = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    networks: list[nn.Module] = []
    seeds = [member_seed(seed, 0 if same_start else p) for p in range(first, first + len(specs))]
    with torch.random.fork_rng(devices=[]):
        for own_seed, factory in zip(seeds, factories):
            torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would touch GPUs too
            networks.append(factory if isinstance(factory, nn.Module) else build(factory, **kwargs))
        if len({id(network) for network in networks}) != len(networks):
            raise InputError("the same built model is given twice; give every peer its own")
        members = [split_head(network, dummy_input(network, in_channels, image_size)) for network in networks]
        for own_seed, factory, member in zip(seeds, factories, members):
            if has_weights(factory):  # with the same head too, the members would remain copies of each other
                torch.default_generator.manual_seed(own_seed)
                for module in member.head.modules():
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()
    return members


def num_head_classes(member: SplitMember) -> int:
    """Return the number of classes that a member's head ends in."""
    return [module for module in member.head.modules() if isinstance(module, nn.Linear)][-1].out_features
