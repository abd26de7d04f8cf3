"""What one process of a mesh does in tests/test_mesh.py: train cases a few steps, compare checkpoints, count bytes.

Run by torchrun: mesh_worker.py TASK FOLDER; the first rank writes what it found to FOLDER.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from codistill.config import Config
from codistill.mesh import join_mesh, leave
from codistill.method_configs import method_config
from codistill.peers import NetworkPeers
from codistill.setup import setup
from codistill.train import _close_epoch, _zero_sums, measure, train_step
from codistill.setup import test_loader as whole_test_set

STEPS = 20
# (method, options, topology, number of peers)
CASES = {
    "independent": ("independent", {}, "networks", 4),
    "independent, branches": ("independent", {}, "branches", 3),
    "kd": ("kd", {}, "networks", 4),
    "dml, alternating": ("dml", {}, "networks", 4),
    "dml, joint": ("dml", {"update": "joint"}, "networks", 4),
    "dml, okddip_code (not detached)": ("dml", {"variant": "okddip_code"}, "networks", 4),
    "cl_ilr": ("cl_ilr", {}, "networks", 4),
    "cl_ilr, okddip_code (not detached)": ("cl_ilr", {"variant": "okddip_code"}, "networks", 4),
    "cl_ilr, branches": ("cl_ilr", {}, "branches", 3),
    "one, branches": ("one", {}, "branches", 3),
    "one, okddip_code, branches": ("one", {"variant": "okddip_code"}, "branches", 3),
    "okddip (not detached)": ("okddip", {}, "networks", 4),
    "okddip, okddip_code (not detached)": ("okddip", {"variant": "okddip_code"}, "networks", 4),
    "okddip, detach=all": ("okddip", {"detach": "all"}, "networks", 4),
    "okddip, detach=peers": ("okddip", {"detach": "peers"}, "networks", 4),
    "okddip, no leader": ("okddip", {"ablation": "no_leader"}, "networks", 4),
    "okddip, random": ("okddip", {"ablation": "random"}, "networks", 4),
    "okddip, branches": ("okddip", {}, "branches", 3),
    "pcl": ("pcl", {}, "networks", 4),
    "pcl, branches": ("pcl", {}, "branches", 3),
    "kdcl, minlogit": ("kdcl", {}, "networks", 4),
    "kdcl, naive": ("kdcl", {"target": "naive"}, "networks", 4),
    "kdcl, linear": ("kdcl", {"target": "linear"}, "networks", 4),
    "kdcl, linear a batch": ("kdcl", {"target": "linear", "granularity": "batch"}, "networks", 4),
    "kdcl, general": ("kdcl", {"target": "general", "holdout_fraction": 0.1}, "networks", 4),
    "kdcl, branches": ("kdcl", {}, "branches", 3),
}


def config(case: str, **more) -> Config:
    """60 images in batches of 14: the last batch of an epoch has 4, which 3 ranks cannot share evenly."""
    name, options, topology, peers = CASES[case]
    method = dataclasses.replace(method_config(name), **options)
    values = {"model": "resnet8", "data": "digits", "train_per_class": 6, "batch_size": 14, "epochs": 4, "lr": 0.02}
    return Config(method=method, topology=topology, peers=peers, dtype="float64", **values | more).resolved()


def teacher(case: str):
    if not case.startswith("kd") or case.startswith("kdcl"):
        return None
    return NetworkPeers("resnet8", 1, 10, seed=5, in_channels=1, image_size=8).export_member(0)


def run_steps(t, steps=STEPS):
    """Train and return the state, with the loss and figures that would be reported."""
    done, lines = 0, []
    while done < steps:
        t.sums, t.step = _zero_sums(t), 0
        t.peers.train()
        t.method.train()
        for views, targets in t.loader.epoch(t.epoch):
            train_step(t, views, targets, 0.7)
            t.step += 1
            done += 1
            if done == steps:
                break
        lines.append(_close_epoch(t, None)["train"])
        t.epoch += 1
    assert t.guard.look() is None
    return t.state(), lines, measure(t, whole_test_set(t))["members"]


def exactness(mesh_text: str, folder: Path) -> None:
    from codistill.mesh import Mesh

    mesh: Mesh | None = None
    data, peer = (int(part.split("=")[1]) for part in mesh_text.split(","))
    for number, case in enumerate(CASES):
        if peer > 1 and CASES[case][2] == "branches":
            continue
        for sync in (False, True) if data > 1 else (False,):
            if sync and case not in SYNCED:
                continue
            c = config(case, mesh=mesh_text, sync_bn=sync)
            mesh = join_mesh(c, torch.device("cpu"))
            assert mesh is not None
            t = setup(c, teacher(case), mesh)
            state, lines, figures = run_steps(t)
            if state is not None:
                found = {"case": case, "lines": lines, "figures": figures, "state": state, "sent": dict(mesh.sent)}
                torch.save(found, folder / f"{number}-{data}-{peer}-{int(sync)}.pt")


SYNCED = ("dml, alternating", "okddip (not detached)", "pcl", "one, branches", "okddip, branches", "kdcl, linear a batch")


def main() -> None:
    torch.set_num_threads(1)
    task, folder, *meshes = sys.argv[1:]
    for mesh_text in meshes:
        {"exactness": exactness}[task](mesh_text, Path(folder))
    leave()


if __name__ == "__main__":
    main()
