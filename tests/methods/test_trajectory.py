"""Twelve whole training steps equal those of the published OKDDip code, in float64.

`golden/trajectory.npz` holds what the authors' own training steps give: `NAME_losses`, the loss stepped on at each of
12 steps, and `NAME_abs_sum_P`, the sum of the absolute values of a member's parameters and running statistics after the
last step. Weights and images are formulas, so nothing else is stored. The code trains okddip, one, cl_ilr, dml and
independent peers; for pcl, kdcl and kd there is no such record.
Shapes: P peers, B batch.
"""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import codistill as cd
from helpers.common import GOLDEN

RECORDED = np.load(GOLDEN.parent / "trajectory.npz")
STEPS, PEERS, BATCH = 12, 4, 8


def okddip(peers: cd.BranchPeers | cd.NetworkPeers) -> cd.methods.Method:
    return cd.methods.OKDDip(PEERS, peers.feature_dims[0], variant="okddip_code")


CASES = {
    "okddip_branches": ("branches", okddip),
    "okddip_networks": ("networks", okddip),
    "one_branches": ("branches", lambda peers: cd.methods.ONE(PEERS, peers.trunk_dim, variant="okddip_code")),
    "cl_ilr_branches": ("branches", lambda peers: cd.methods.CLILR(PEERS, variant="okddip_code")),
    "independent_branches": ("branches", lambda peers: cd.methods.Independent(PEERS)),
    "dml_mean_networks": ("networks", lambda peers: cd.methods.DML(PEERS, variant="okddip_code", target="mean")),
    "dml_pairwise_networks": ("networks", lambda peers: cd.methods.DML(PEERS, variant="okddip_code")),
}


def wave(shape: tuple[int, ...], phase: float, amplitude: float, offset: float = 0.0) -> Tensor:
    """Return `offset + amplitude * sin(0.7310585786 i + phase)` over the flattened tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (offset + amplitude * torch.sin(0.7310585786 * i + phase)).view(shape)


@torch.no_grad()
def set_formulas(module: nn.Module, member: int) -> None:
    """Give every parameter its formula; running statistics keep the 0 and 1 they begin with."""
    for path, parameter in module.named_parameters():
        name = path.removeprefix("body.").replace(".inner.", ".").replace("head.", "fc.")
        phase = zlib.crc32(name.encode()) % 1000 / 100 + 1.7 * member
        shape = tuple(parameter.shape)
        if len(shape) > 1:
            parameter.copy_(wave(shape, phase, math.sqrt(2 / math.prod(shape[1:]))))
        else:
            parameter.copy_(wave(shape, phase, 0.1, offset=1.0 if name.endswith("weight") else 0.0))


def batch(step: int) -> tuple[Tensor, Tensor]:
    shape = (BATCH, 3, 32, 32)
    images = wave(shape, 0.31 * step, 1.0) + 0.5 * wave(shape, 1.0 + step, 1.0).flip(0)
    return images, torch.tensor([(7 * b + step) % 10 for b in range(BATCH)])


def abs_sum(module: nn.Module) -> float:
    """Return the sum of absolute values of parameters and running statistics."""
    return sum(x.abs().sum().item() for x in module.state_dict().values() if x.is_floating_point())


@pytest.mark.parametrize("name", CASES)
def test_twelve_steps_equal_the_published_code(name):
    topology, build = CASES[name]
    kind = cd.BranchPeers if topology == "branches" else cd.NetworkPeers
    peers = kind("resnet8", num_peers=PEERS, num_classes=10).double()
    method = build(peers).double()
    if topology == "branches":
        peers.set_rescale(method.rescale_trunk)
    for p in reversed(range(PEERS)):  # what branches share takes the values of member 0
        set_formulas(peers.member(p), p)
    set_formulas(method, 0)
    parameters = [*peers.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 8 else 0.005
        ramp = 1.0 if name.startswith("dml") else math.exp(-5 * (1 - min(step // 3, 3) / 3) ** 2)
        images, labels = batch(step)
        loss = method(peers(images), labels, weight=ramp)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, RECORDED[f"{name}_losses"], rtol=1e-9, atol=1e-9)
    sums = [abs_sum(peers.member(p)) for p in range(PEERS)]
    np.testing.assert_allclose(sums, RECORDED[f"{name}_abs_sum_P"], rtol=1e-9)
