"""What one process of a mesh does in tests/test_mesh.py: train cases a few steps and hand the state to the test.

Run by torchrun: mesh_worker.py PLAN FOLDER, where PLAN is JSON: lists [number, case, sync_bn, meshes]. A case goes from
mesh to mesh through its checkpoint and does an equal part of its steps on each.
"""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import torch

from codistill.config.config import Config
from codistill.config.methods import method_config
from codistill.distributed.launch import init_mesh, shutdown
from codistill.peers.networks import NetworkPeers
from codistill.runs.checkpoint import rng_state
from codistill.training.build import build_run
from codistill.training.loaders import test_loader
from codistill.training.loop import end_epoch
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state, restore_state
from codistill.training.step import train_step
from codistill.training.student import count_trained_and_deployed
from codistill.training.summary import evaluate_run

STEPS = 20
CASES = {
    "independent": ("independent", {}, "networks"),
    "independent, branches": ("independent", {}, "branches"),
    "kd": ("kd", {}, "networks"),
    "kd, dist": ("kd", {"divergence": "dist", "temperature": 1.0}, "networks"),
    "pcl, dist": ("pcl", {"divergence": "dist", "temperature": 1.0}, "networks"),
    "dml, alternating": ("dml", {}, "networks"),
    "dml, joint": ("dml", {"update": "joint"}, "networks"),
    "dml, authors": ("dml", {"variant": "authors"}, "networks"),
    "dml, okddip_code": ("dml", {"variant": "okddip_code"}, "networks"),
    "cl_ilr": ("cl_ilr", {}, "networks"),
    "cl_ilr, okddip_code": ("cl_ilr", {"variant": "okddip_code"}, "networks"),
    "cl_ilr, branches": ("cl_ilr", {}, "branches"),
    "one, branches": ("one", {}, "branches"),
    "one, okddip_code, branches": ("one", {"variant": "okddip_code"}, "branches"),
    "okddip": ("okddip", {}, "networks"),
    "okddip, okddip_code": ("okddip", {"variant": "okddip_code"}, "networks"),
    "okddip, detach=all": ("okddip", {"detach": "all"}, "networks"),
    "okddip, detach=peers": ("okddip", {"detach": "peers"}, "networks"),
    "okddip, no leader": ("okddip", {"ablation": "no_leader"}, "networks"),
    "okddip, random": ("okddip", {"ablation": "random"}, "networks"),
    "okddip, entropy": ("okddip", {"ablation": "entropy"}, "networks"),
    "okddip, symmetric": ("okddip", {"ablation": "symmetric"}, "networks"),
    "okddip, branches": ("okddip", {}, "branches"),
    "pcl": ("pcl", {}, "networks"),
    "pcl, branches": ("pcl", {}, "branches"),
    "kdcl, minlogit": ("kdcl", {}, "networks"),
    "kdcl, naive": ("kdcl", {"target": "naive"}, "networks"),
    "kdcl, linear": ("kdcl", {"target": "linear"}, "networks"),
    "kdcl, linear a batch": ("kdcl", {"target": "linear", "granularity": "batch"}, "networks"),
    "kdcl, general": ("kdcl", {"target": "general", "holdout_fraction": 0.1}, "networks"),
    "kdcl, branches": ("kdcl", {}, "branches"),
    "codistillation": ("codistillation", {"interval": 3, "burn_in_epochs": 0.0}, "networks"),
    "codistillation, disjoint": (
        "codistillation",
        {"interval": 3, "burn_in_epochs": 0.0, "partition": "disjoint"},
        "networks",
    ),
    "codistillation, disjoint, two parts, mixed": (
        "codistillation",
        {"interval": 2, "burn_in_epochs": 0.0, "partition": "disjoint"},
        "networks",
    ),
    "codistillation, disjoint, branches": (
        "codistillation",
        {"interval": 2, "burn_in_epochs": 0.0, "partition": "disjoint"},
        "branches",
    ),
    "codistillation, disjoint, dist": (
        "codistillation",
        {"interval": 2, "burn_in_epochs": 0.0, "partition": "disjoint", "divergence": "dist"},
        "networks",
    ),
    "switokd": ("switokd", {}, "networks"),
    "mcl": ("mcl", {"logit_weight": 1.0}, "networks"),
    "mcl, branches": ("mcl", {}, "branches"),
    "hssakd": ("hssakd", {}, "networks"),
    "l_mcl": ("l_mcl", {}, "networks"),
    "hssakd, dist": ("hssakd", {"divergence": "dist", "temperature": 1.0}, "networks"),
    "hssakd, two parts": ("hssakd", {"exits": 1}, "networks"),
    "cosub": ("cosub", {"own_views": True}, "twins"),
    "okdph": ("okdph", {"shares": "dirichlet", "fusion": 0.3, "interval": 2}, "networks"),
    "okddip, smoothed labels": ("okddip", {}, "networks"),
    "cl_ilr, two parts, mixed": ("cl_ilr", {}, "networks"),
    "okddip, two parts": ("okddip", {}, "networks"),
    "okddip, mixed": ("okddip", {}, "networks"),
    "kdcl, general, mixed and cut": ("kdcl", {"target": "general", "holdout_fraction": 0.1}, "networks"),
    "one, branches, cut": ("one", {}, "branches"),
    "okddip, frozen parts, heads' rate": ("okddip", {}, "networks"),
    "dml, alternating, frozen parts, heads' rate": ("dml", {}, "networks"),
    "okddip, branches, frozen trunk, heads' rate": ("okddip", {}, "branches"),
    "independent, branches, EMA deployed": ("independent", {}, "branches"),
    "dml, joint, SWA deployed": ("dml", {"update": "joint"}, "networks"),
    "okddip, SAM": ("okddip", {}, "networks"),
}
MORE = {
    "codistillation": {"freeze": ("conv1", "bn1")},
    "hssakd, dist": {"skip_nonfinite": 1},  # the full batch: one rank counts no samples
    "codistillation, disjoint": {"batch_size": 9, "skip_nonfinite": 1},  # 4 batches an epoch, as all have
    "codistillation, disjoint, two parts, mixed": {"batch_size": 9, "mixup": 0.3, "accumulate": 2},
    "codistillation, disjoint, branches": {"batch_size": 9},
    "codistillation, disjoint, dist": {"batch_size": 9},
    "okddip, smoothed labels": {"label_smoothing": 0.1},
    "cl_ilr, two parts, mixed": {"accumulate": 2, "mixup": 0.3},
    "okddip, two parts": {"accumulate": 2},
    "hssakd, two parts": {"accumulate": 2},
    "okddip, mixed": {"mixup": 0.3},
    "kdcl, general, mixed and cut": {"mixup": 0.3, "cutmix": 1.0},
    "one, branches, cut": {"cutmix": 1.0, "label_smoothing": 0.1},
    "okddip, frozen parts, heads' rate": {"freeze": ("conv1", "bn1", "layer2"), "head_lr_scale": 3.0},
    "dml, alternating, frozen parts, heads' rate": {"freeze": ("conv1", "bn1"), "head_lr_scale": 3.0},
    "okddip, branches, frozen trunk, heads' rate": {"freeze": ("trunk",), "head_lr_scale": 3.0},
    "independent, branches, EMA deployed": {"deploy": "ema"},
    "okddip, SAM": {"sam_rho": 0.05},
    "dml, joint, SWA deployed": {"deploy": "swa", "swa_start": 0.5, "mixup": 0.3},
}


def config(case: str, **more) -> Config:
    """60 images in batches of 19: uneven parts, and a last batch of 3, of which a fourth rank gets nothing."""
    name, options, topology = CASES[case]
    method = dataclasses.replace(method_config(name), **options)
    values = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 19, "epochs": 5, "lr": 0.02}
    values |= MORE.get(case, {})
    return Config(method=method, topology=topology, dtype="float64", **values | more).resolved()


def num_peers(case: str, meshes: list[str]) -> int:
    """Return the fewest peers that a case can have on all of these meshes."""
    return 4 if CASES[case][0] == "okddip" or "peer=4" in "".join(meshes) else 2


def teacher(case: str):
    if CASES[case][0] != "kd":
        return None
    return NetworkPeers("resnet8", 1, 10, seed=5, in_channels=1, image_size=8).export_member(0)


def run_steps(t, until: int):
    """Train to step `until`, from wherever `t` stands; return the figures of the epochs that ended on the way."""
    lines = []
    t.peers.train()
    t.method.train()
    for module in t.frozen:
        module.eval()
    while t.progress.epoch * len(t.loader) + t.progress.step < until:
        if t.progress.step == 0:
            t.progress.sums = zero_sums(t)
        for views, targets in t.loader.epoch(t.progress.epoch, t.progress.step):
            train_step(t, views, targets, 0.7)
            t.progress.step += 1
            if t.progress.epoch * len(t.loader) + t.progress.step == until:
                break
        if t.progress.step == len(t.loader):
            lines.append(end_epoch(t, None)["train"])
            t.progress.epoch, t.progress.step = t.progress.epoch + 1, 0
    assert t.guard.check_finite() is None
    return lines


def finish(t, lines):
    """Return all that is compared."""
    figures = evaluate_run(t, test_loader(t))["members"]
    numbers = count_trained_and_deployed(t)
    return {"state": checkpoint_state(t), "lines": lines, "figures": figures, "numbers": numbers}


def walk(number: int, case: str, sync: bool, meshes: list[str], folder: Path) -> None:
    lines = []
    place = folder / f"{number}.state"
    for leg, mesh_text in enumerate(meshes):
        c = config(case, mesh=mesh_text, sync_bn=sync, peers=num_peers(case, meshes))
        mesh = init_mesh(c, torch.device("cpu"))
        assert mesh.world > 1
        t = build_run(c, teacher(case), mesh=mesh)
        if leg:
            restore_state(t, torch.load(place, weights_only=True))
        lines += run_steps(t, STEPS * (leg + 1) // len(meshes))
        state = checkpoint_state(t)
        mesh.run_on_main_rank(lambda state=state: torch.save({**state, "rng": rng_state()}, place))
    sent = dict(mesh.bytes_sent)
    found = finish(t, lines) | {"sent": sent}
    if mesh.rank == 0:
        torch.save(found, folder / f"{number}.pt")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plan, folder = sys.argv[1:]
    for number, case, sync, meshes in json.loads(plan):
        walk(number, case, sync, meshes, Path(folder))
    shutdown()


if __name__ == "__main__":
    main()
