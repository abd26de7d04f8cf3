"""Building members, each from its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from codistill.models import build, has_weights, resolve
from codistill.peers.split_head import SplitMember, dummy_input, split_head
from codistill.utils.errors import InputError

Spec = str | Callable[..., nn.Module] | nn.Module


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
        members = [split_head(b, dummy_input(b, in_channels, image_size)) for b in built]
        for p, (factory, member) in enumerate(zip(factories, members), first):
            if has_weights(factory):  # with one head for all, the members would be copies of each other for ever
                torch.default_generator.manual_seed(member_seed(seed, p))
                for module in member.head.modules():
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()
    return members


def _num_classes(member: SplitMember) -> int:
    """Return the number of classes that a member's head ends in."""
    return [module for module in member.head.modules() if isinstance(module, nn.Linear)][-1].out_features
