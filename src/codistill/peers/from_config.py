"""Peers of a config."""

from __future__ import annotations

from codistill.config import Config
from codistill.models import resolve
from codistill.peers.base import Peers
from codistill.peers.branches import BranchPeers
from codistill.peers.networks import NetworkPeers
from codistill.peers.twins import TwinPeers


def build_peers(
    config: Config, num_classes: int, in_channels: int, image_size: int, members: range | None = None
) -> Peers:
    """Build the peers of a resolved config, or (of networks) only those with the numbers `members`."""
    assert config.peers is not None
    kwargs = {"seed": config.seed, "in_channels": in_channels, "image_size": image_size}
    specs = [resolve(name, pretrained=config.pretrained, weights=config.weights) for name in config.model]
    if config.topology == "networks":
        members = range(config.peers) if members is None else members
        chosen = [specs[p if len(specs) > 1 else 0] for p in members]
        method = config.method
        extras = {"same_start": method.same_start, "exits": method.num_exits(), "maps": method.num_maps()}
        return NetworkPeers(chosen, len(members), num_classes, first=members.start, **extras, **kwargs)
    if config.topology == "twins":
        return TwinPeers(specs[0], config.peers, num_classes, **kwargs)
    return BranchPeers(
        specs[0], config.peers, num_classes, branch_at=config.branch_at, fan_out=config.fan_out, **kwargs
    )
