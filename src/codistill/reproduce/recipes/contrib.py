"""The tables of the methods in `methods/contrib`, with the settings of their released code.

All train on CIFAR-100 (HSSAKD on ImageNet too), with weight decay 5e-4 there, and report the best epoch on the test
set, of the better network (MCL, HSSAKD), of the best head (L-MCL), or of the better of students and hybrid (OKDPH).
Here the deployed network is judged, declared before training. The baselines of equal cost train longer where a step of
the method costs more than one of as many independent networks. The schedules are those of the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from codistill.config import Config, HSSAKDConfig, IndependentConfig, LMCLConfig, MCLConfig, MethodConfig, OKDPHConfig
from codistill.reproduce.recipes.table_recipe import IMAGENET, CellRef, TableRecipe

INDEPENDENT = "Ind"
"""The baseline; followed by `, 9 x epochs` it trains so many times longer."""
COSINE = {"epochs": 300, "schedule": "cosine", "batch_size": 128, "sampler": "pairs:2"}
"""MCL's and L-MCL's schedule; batches of 2 images of each of 64 classes."""


def _make_config(options: MethodConfig, network: str, method: str, **values: object) -> Config:
    """Return the config of 2 networks, or of as many independent ones."""
    independent = method.startswith(INDEPENDENT)
    values = {"data": "cifar100", "topology": "networks", "peers": 2} | values
    config = Config(method=IndependentConfig() if independent else options, model=network, **values)  # type: ignore[arg-type]
    if not (independent and ", " in method):
        return config
    factor = float(method.split(", ")[1].split()[0])
    milestones = config.milestones and tuple(int(epoch * factor) for epoch in config.milestones)
    return dataclasses.replace(config, epochs=int(config.epochs * factor), milestones=milestones)


def hssakd_cifar100(network: str, method: str) -> Config:
    """CIFAR-100 accuracy of 2 networks: ResNet-56 78.16; 240 epochs of batch 64, rate 0.05 divided at 150, 180, 210."""
    schedule = {"epochs": 240, "milestones": (150, 180, 210), "batch_size": 64, "lr": 0.05}
    return _make_config(HSSAKDConfig(), network, method, **schedule)


def hssakd_imagenet(network: str, method: str) -> Config:
    """ImageNet accuracy of ResNet-18: 69.75 alone, 71.49 of 2; 100 epochs of batch 256, divided at 30, 60, 90."""
    schedule = {"epochs": 100, "milestones": (30, 60, 90), "batch_size": 256, "weight_decay": 1e-4, "image_size": 224}
    name = INDEPENDENT if method == "Baseline" else method
    config = _make_config(HSSAKDConfig(), f"torchvision:{network}", name, data=IMAGENET, **schedule)
    return dataclasses.replace(config, peers=1) if method == "Baseline" else config


def mcl_cifar100(network: str, method: str) -> Config:
    """CIFAR-100 accuracy of 4 branches from the second stage on: ResNet-32 74.04; 300 epochs, cosine, rate 0.1."""
    options = MCLConfig(logit_weight=1.0 if method == "MCL with logits" else 0.0)
    branches = {"topology": "branches", "peers": 4, "branch_at": ("layer2",)}
    return _make_config(options, network, method, **COSINE, **branches)


def l_mcl_cifar100(network: str, method: str) -> Config:
    """CIFAR-100 accuracy of 2 networks with learned matches: ResNet-32 75.82; 300 epochs, cosine, rate 0.1."""
    return _make_config(LMCLConfig(match="learned"), network, method, **COSINE)


def okdph_cifar100(network: str, method: str) -> Config:
    """CIFAR-100 accuracy: ResNet-110 79.68; 300 epochs, plain momentum; fusion with g = 0.5 every 5 batches."""
    options = OKDPHConfig(label_weight=0.8, weight=0.8, fusion=0.5, interval=5)
    schedule = {"epochs": 300, "milestones": (150, 225), "batch_size": 128, "nesterov": False}
    return _make_config(options, network, method, **schedule, auto_augment="randaugment")


def _ref(network: str, method: str) -> tuple[CellRef, ...]:
    return (CellRef(network, method, network),)


def _make_recipe(
    config: Callable[[str, str], Config],
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    factor: float,
    *guesses: str,
) -> TableRecipe:
    """Return the recipe of a table.

    Args:
        config: (network, method) -> config.
        networks: Rows.
        methods: Columns.
        factor: A method's training passes over those of as many independent members, which train so much longer.
        guesses: See `TableRecipe`.
    """
    baseline = INDEPENDENT if factor == 1 else f"{INDEPENDENT}, {factor:g} x epochs"
    equal = {method: baseline for method in methods if method != "Baseline"}
    if factor != 1:
        guesses = (*guesses, f"{baseline} is the baseline of equal cost; at smoke scale it has the epochs of all rows")
    return TableRecipe(config, networks, methods, _ref, equal, guesses=guesses)


_BETTER = "the deployed network is judged, the authors' code takes the better one at its best test epoch"
TABLES = {
    "hssakd_cifar100": _make_recipe(hssakd_cifar100, ("resnet56", "wrn40_2"), ("HSSAKD",), 9, _BETTER),
    "hssakd_imagenet": _make_recipe(
        hssakd_imagenet,
        ("resnet18",),
        ("Baseline", "HSSAKD"),
        9.5,
        *(_BETTER, "where the exits begin, and that there are 3"),
    ),
    "mcl_cifar100": _make_recipe(
        mcl_cifar100,
        ("resnet32", "resnet56", "wrn16_2", "wrn40_2"),
        ("MCL", "MCL with logits"),
        1,
        *(_BETTER, "Ind draws its batches as MCL does"),
    ),
    "l_mcl_cifar100": _make_recipe(
        l_mcl_cifar100,
        ("resnet32", "resnet56", "wrn16_2", "wrn40_2"),
        ("L-MCL",),
        2.5,
        "the network's own head is judged, the authors' code takes the best of its 3 heads at its best test epoch",
        "Ind draws its batches as L-MCL does",
    ),
    "okdph_cifar100": _make_recipe(
        okdph_cifar100,
        ("resnet110",),
        ("OKDPH",),
        1.5,
        "student 0 is judged, the authors' code takes the best of students and hybrid at its best test epoch",
        *("2 students", "all students have RandAugment; in the code each has a kind of augmentation of its own"),
    ),
}
