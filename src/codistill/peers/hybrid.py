"""Networks whose weights are means of the members' weights, theta_h = sum_p r_p theta_p (OKDPH, CVPR 2023).

The members are whole networks of one architecture, which begin with the same weights: means of networks that were
initialized independently are no better than chance.
Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from codistill.peers.base import Peers
from codistill.peers.heads import places
from codistill.peers.inputs import Inputs, device_of
from codistill.peers.modes import autocast_of, frozen_batchnorm_stats
from codistill.peers.split_head import SplitMember
from codistill.utils import InputError

State = dict[str, Tensor]


def hybrid_logits(peers: Peers, inputs: Inputs, shares_P: Tensor | None = None) -> Tensor:
    """Return the logits `B x C` of the network with weights theta_h; its gradient reaches every member's parameters.

    The gradient of theta_p is r_p times that of theta_h. BatchNorm in training mode normalizes by the batch, and
    records nothing.

    Args:
        peers: Whole networks of one architecture, run one after the other.
        inputs: What the networks take, one view for all.
        shares_P: r, which sums to 1; default 1/P each.

    >>> from codistill.peers import NetworkPeers
    >>> peers = NetworkPeers("resnet8", 2, 10, same_start=True, in_channels=1, image_size=8).eval()
    >>> images = torch.rand(4, 1, 8, 8)
    >>> torch.allclose(hybrid_logits(peers, images), peers(images).logits_PBC[0], atol=1e-5)
    True
    """
    member, weights = peers.member(0), mix_members(peers, shares_P)

    def run(inputs: Inputs) -> Tensor:
        # Activations are recomputed by the checkpoint below: the member's own would run with the member's weights.
        recompute, member.checkpoint_activations = member.checkpoint_activations, False
        try:
            with frozen_batchnorm_stats(member):
                return functional_call(member, weights, (inputs,))[1]
        finally:
            member.checkpoint_activations = recompute

    with autocast_of(device_of(inputs), peers.autocast):
        if member.checkpoint_activations and member.training and torch.is_grad_enabled():
            return checkpoint(run, inputs, use_reentrant=False)
        return run(inputs)


def mix_members(peers: Peers, shares_P: Tensor | None = None) -> State:
    """Return theta_h by name: the parameters and, without gradient, the running statistics.

    Args:
        peers: Whole networks of one architecture.
        shares_P: r, which sums to 1; default 1/P each.
    """
    members = [peers.member(p) for p in range(peers.num_peers)]
    mixed = dict(zip(dict(members[0].named_parameters()), _mix([[*m.parameters()] for m in members], shares_P)))
    with torch.no_grad():
        buffers = [_running_statistics(m) for m in members]
        return mixed | dict(zip(buffers[0], _mix([[*b.values()] for b in buffers], shares_P)))


@torch.no_grad()
def fuse_members(peers: Peers, amount: float, weights: State | None = None, good: Tensor | None = None) -> None:
    """Move every member towards theta_h: theta_p <- (1 - amount) theta_p + amount theta_h, running statistics too.

    Args:
        peers: Whole networks of one architecture.
        amount: From 0 to 1, where all become theta_h.
        weights: theta_h, from `mix_members`; default the mean of the members as they are.
        good: One number on the device; where it is 0, nothing changes.
    """
    weights = mix_members(peers) if weights is None else weights
    for p in range(peers.num_peers):
        own = dict(peers.member(p).named_parameters()) | _running_statistics(peers.member(p))
        for name, value in own.items():
            moved = weights[name] if amount == 1 else value.lerp(weights[name], amount)
            value.copy_(moved if good is None else torch.where(good, moved, value))


def hybrid_network(peers: Peers) -> nn.Module:
    """Return the mean of the members as one plain network.

    The mean of running statistics is not what its BatchNorms see: `torch.optim.swa_utils.update_bn` recomputes them.
    """
    network, member = peers.export_member(0), peers.member(0)
    state = network.state_dict()
    with torch.no_grad():
        for name, value in mix_members(peers).items():
            state[_plain_name(name, member)].copy_(value)  # in place, for weights that have two names
    return network


def check_mixable(peers: Peers, name: str) -> None:
    """Check that the weights of all members can be averaged.

    Args:
        peers: This process's peers.
        name: The method that needs it, for the message.

    Raises:
        InputError: the members differ in architecture.
    """
    shapes = [[(n, v.shape) for n, v in peers.member(p).state_dict().items()] for p in range(peers.num_peers)]
    if any(other != shapes[0] for other in shapes):
        raise InputError(f"--model: {name} averages the weights of all peers, which takes one architecture; give one")


def _plain_name(name: str, member: SplitMember) -> str:
    """Return the name in the plain network of a member's parameter or buffer."""
    part, _, rest = name.partition(".")
    if part == "body":
        return rest
    modules = {id(module): f"{path}." if path else "" for path, module in member.head.named_modules()}
    prefixes = {modules[id(module)]: place for place, module in places(member.head_path, member.head).items()}
    prefix = next(prefix for prefix in prefixes if rest.startswith(prefix))
    return f"{prefixes[prefix]}.{rest.removeprefix(prefix)}"


def _running_statistics(member: SplitMember) -> State:
    """Return the floating-point buffers by name."""
    return {name: buffer for name, buffer in member.named_buffers() if buffer.is_floating_point()}


def _mix(values: list[list[Tensor]], shares_P: Tensor | None) -> list[Tensor]:
    """Return sum_p r_p x_p for every tensor x of the members."""
    if not values[0]:
        return []
    if shares_P is None:
        shares = [1.0 / len(values)] * len(values)
    else:
        shares = list(shares_P.to(values[0][0].dtype).unbind())
    return [sum((r * x for r, x in zip(shares[1:], xs[1:])), shares[0] * xs[0]) for xs in zip(*values)]
