"""The tables of PCL (Wu & Gong, AAAI 2021): 3 members of every method, with the same options.

SGD with Nesterov momentum 0.9, learning rate 0.1 divided by 10 at epochs 150 and 225 of 300, batch 128, weight decay
5e-4; PCL with T = 3 and a ramp of 80 epochs. The published numbers are second-hand, and no source states the options of
the other methods: each follows its own paper here. FFL-S is shown as published and not trained. The ImageNet schedule
is a guess.
"""

from __future__ import annotations

import dataclasses

from codistill.config import (
    CLILRConfig,
    Config,
    DMLConfig,
    IndependentConfig,
    KDCLConfig,
    MethodConfig,
    OKDDipConfig,
    ONEConfig,
    PCLConfig,
)
from codistill.reproduce.recipes.table_recipe import IMAGENET, CellRef, TableRecipe, with_imagenet_schedule

NETWORKS = ("resnet32", "resnet110", "vgg16", "densenet40_12", "wrn20_8")
METHODS: dict[str, type[MethodConfig]] = {
    "DML": DMLConfig,
    "CL-ILR": CLILRConfig,
    "ONE": ONEConfig,
    "OKDDip": OKDDipConfig,
    "KDCL": KDCLConfig,
    "PCL": PCLConfig,
}
ON_NETWORKS = ("DML", "KDCL", "Ind-network")
EQUAL_COST = {method: "Ind-network" if method in ON_NETWORKS else "Ind-branch" for method in METHODS}


def _make_config(network: str, method: str, data: str) -> Config:
    options = METHODS.get(method, IndependentConfig)()
    topology = "networks" if method in ON_NETWORKS else "branches"
    return Config(method=options, model=network, data=data, topology=topology, peers=3)


def cifar100(network: str, method: str) -> Config:
    """CIFAR-100 accuracy; resnet32: PCL 74.14, DML 73.68. Hardware and time are not stated."""
    return _make_config(network, method, "cifar100")


def cifar10(network: str, method: str) -> Config:
    """CIFAR-10 accuracy; resnet32: PCL 94.33, DML 93.94. Hardware and time are not stated."""
    return _make_config(network, method, "cifar10")


def imagenet(network: str, method: str) -> Config:
    """ImageNet error of ResNet-18: PCL 29.58, second-hand; a schedule of 90 epochs, which is a guess."""
    config = with_imagenet_schedule(_make_config(f"torchvision:{network}", method, IMAGENET))
    return dataclasses.replace(config, branch_at=("layer3",))


def _ref(network: str, method: str) -> tuple[CellRef, ...]:
    return (CellRef(network, method, network),)


_GUESSES = (
    "the options of the other methods: each follows its own paper, KDCL with minlogit and augmentations per network",
    "OKDDip's 3 members are 2 peers and the leader",
    "of PCL and the methods without a leader, peer 0 is judged, not its mean teacher",
)
TABLES = {
    "pcl_cifar100": TableRecipe(cifar100, NETWORKS, tuple(METHODS), _ref, EQUAL_COST, guesses=_GUESSES),
    "pcl_cifar10": TableRecipe(cifar10, NETWORKS, tuple(METHODS), _ref, EQUAL_COST, guesses=_GUESSES),
    "pcl_imagenet": TableRecipe(
        imagenet,
        ("resnet18",),
        ("PCL",),
        _ref,
        {"PCL": "Ind-branch"},
        guesses=(
            "the schedule: 90 epochs, batch 256, learning rate 0.1 divided by 10 at 30 and 60, weight decay 1e-4",
            "a ramp of 24 epochs, 80/300 of the schedule; on CIFAR it is 80 of 300",
            "student peer 0 is judged, not its mean teacher",
            "the fork at layer3, so that a branch consists of the last two stages; not checked against the paper",
        ),
    ),
}
