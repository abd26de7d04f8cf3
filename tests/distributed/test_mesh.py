"""Meshes of processes against one process: exactness, checkpoints that change meshes, bytes, bad input.

`CODISTILL_ALL_MESHES=1 pytest -s tests/distributed/test_mesh.py` compares every method on meshes of 2 and 4 processes
and prints the table of docs/distributed.md (a quarter of an hour).
"""

import json
import math
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from codistill.cli.main import main
from codistill.config.checks import mesh_shape
from codistill.config.config import Config
from codistill.config.schedule import learning_rate_at
from codistill.distributed.launch import backend_for, init_mesh
from codistill.distributed.mesh import SingleProcess
from codistill.distributed.peers import MeshPeers, describe_imbalance
from codistill.peers.networks import NetworkPeers
from codistill.training.build import build_run
from codistill.training.state import checkpoint_state
from codistill.utils import share_out
from codistill.utils.errors import InputError
from helpers.mesh_reference import largest_difference, one_process
from helpers.mesh_worker import CASES, config, num_peers, run_steps
from helpers.processes import torchrun

HERE = Path(__file__).parent.parent / "helpers"
# (processes, case, --sync-bn, meshes it goes through)
QUICK = [
    (2, "okddip", False, ["data=1,peer=2"]),
    (2, "dml, alternating", False, ["data=1,peer=2"]),
    (2, "pcl", False, ["data=1,peer=2"]),
    (2, "kdcl, general", False, ["data=1,peer=2"]),
    (2, "kd", False, ["data=1,peer=2"]),
    (2, "codistillation", False, ["data=1,peer=2"]),
    (2, "codistillation, disjoint", False, ["data=1,peer=2"]),
    (2, "codistillation, disjoint, two parts, mixed", False, ["data=2,peer=1"]),
    (2, "codistillation, disjoint, branches", True, ["data=2,peer=1"]),
    (4, "codistillation", True, ["data=2,peer=2"]),
    (4, "codistillation", False, ["data=1,peer=4"]),
    (4, "codistillation, disjoint", True, ["data=2,peer=2", "data=1,peer=4", "data=4,peer=1"]),
    (4, "codistillation, disjoint, dist", True, ["data=2,peer=2"]),
    (2, "cl_ilr, two parts, mixed", False, ["data=1,peer=2"]),
    (2, "dml, okddip_code", False, ["data=2,peer=1"]),
    (2, "kd, dist", False, ["data=2,peer=1"]),
    (2, "switokd", False, ["data=2,peer=1"]),
    (2, "mcl", False, ["data=1,peer=2"]),
    (2, "mcl, branches", False, ["data=2,peer=1"]),
    (2, "hssakd", False, ["data=1,peer=2"]),
    (2, "hssakd, dist", False, ["data=2,peer=1"]),
    (2, "l_mcl", False, ["data=1,peer=2"]),
    (2, "l_mcl", False, ["data=2,peer=1"]),
    (2, "hssakd, two parts", False, ["data=2,peer=1"]),
    (2, "cosub", True, ["data=2,peer=1"]),
    (2, "okdph", False, ["data=2,peer=1"]),
    (2, "okddip, smoothed labels", False, ["data=2,peer=1"]),
    (2, "okddip, two parts", False, ["data=2,peer=1"]),
    (2, "one, okddip_code, branches", False, ["data=2,peer=1"]),
    (2, "pcl, branches", True, ["data=2,peer=1"]),
    (2, "kdcl, linear a batch", False, ["data=2,peer=1"]),
    (2, "kdcl, general, mixed and cut", False, ["data=2,peer=1"]),
    (2, "one, branches, cut", False, ["data=2,peer=1"]),
    (4, "okddip, mixed", True, ["data=2,peer=2"]),
    (2, "okddip, branches, frozen trunk, heads' rate", False, ["data=2,peer=1"]),
    (4, "okddip", True, ["data=2,peer=2"]),
    (2, "independent, branches, EMA deployed", False, ["data=2,peer=1"]),
    (4, "okddip, SAM", True, ["data=2,peer=2"]),
    (4, "dml, joint, SWA deployed", True, ["data=2,peer=2", "data=1,peer=4"]),
    (4, "okddip, frozen parts, heads' rate", True, ["data=1,peer=4", "data=2,peer=2", "data=4,peer=1"]),
    (4, "dml, alternating, frozen parts, heads' rate", False, ["data=1,peer=4"]),
    (4, "one, branches", False, ["data=4,peer=1"]),
    (4, "dml, alternating", True, ["data=1,peer=4", "data=2,peer=2", "data=4,peer=1"]),
]


def everything():
    """All methods on meshes of 2 and 4 processes, as far as they admit them."""
    meshes = [("data=1,peer=2", False), ("data=2,peer=1", False), ("data=2,peer=1", True), ("data=2,peer=2", True)]
    return [
        (math.prod(mesh_shape(mesh)), case, sync, [mesh])
        for case, (_, _, topology) in CASES.items()
        for mesh, sync in meshes
        if topology == "networks" or mesh_shape(mesh)[1] == 1
        # Twins' BatchNorm sees the rows of both at once, which the reference does not divide as ranks do.
        if topology != "twins" or sync
    ]


PLAN = everything() if "CODISTILL_ALL_MESHES" in os.environ else QUICK


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Run the whole plan, one job for each number of processes: starting a job costs more than a case."""
    folder = tmp_path_factory.mktemp("mesh")
    for processes in sorted({entry[0] for entry in PLAN}):
        plan = [(n, *entry[1:]) for n, entry in enumerate(PLAN) if entry[0] == processes]
        command = torchrun(processes, str(HERE / "mesh_worker.py"), json.dumps(plan), str(folder))
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def reference(case: str, chunks: int, peers: int):
    return one_process(case, chunks, peers)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PLAN)), ids=[f"{c}-{'-'.join(m)}-{s}" for _, c, s, m in PLAN])
def test_a_mesh_trains_what_one_process_trains(number, found):
    processes, case, sync, meshes = PLAN[number]
    data = mesh_shape(meshes[0])[0]
    ours = torch.load(found / f"{number}.pt", weights_only=False)
    theirs = reference(case, 1 if sync else data, num_peers(case, meshes))
    # Statistics of a rank's parts are taken one after the other, and then the mean over ranks: no one process does.
    # Nor does the reference fuse the statistics of its parts when a method fuses members (okdph).
    recorded = data == 1 or not ("two parts" in case or case == "okdph")
    difference = largest_difference(ours["state"], theirs["state"], recorded)
    assert ours["numbers"] == theirs["numbers"]
    print(f"| {case} | {' -> '.join(meshes)}{' --sync-bn' if sync else ''} | {difference:.1e} |")
    assert difference <= 1e-9
    for one, other in zip(ours["lines"], theirs["lines"], strict=True):
        assert one["top1"] == other["top1"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-9)
    if not recorded:
        return
    assert ours["figures"]["samples"] == theirs["figures"]["samples"] == 797
    assert ours["figures"]["top1"] == theirs["figures"]["top1"]
    assert ours["figures"]["nll"] == pytest.approx(theirs["figures"]["nll"], abs=1e-9)
    if len(meshes) == 1 and data == 1 and processes == 2:
        # Not a digit differs: the same sums in the same order. Codistillation has other shapes (torch 2.11: 1.3e-16).
        assert difference <= (1e-15 if "codistillation" in case else 0.0)


@pytest.mark.slow
def test_peers_send_outputs_and_no_gradients(found):
    number = PLAN.index((2, "kd", False, ["data=1,peer=2"]))
    sent = torch.load(found / f"{number}.pt", weights_only=False)["sent"]
    assert not any("gradients" in purpose for purpose in sent)
    assert sent["peer: outputs"] == 5 * 60 * 10 * 8  # 5 epochs, 60 images, the logits of one member, float64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "case"), [(2, "codistillation"), (2, "codistillation, disjoint"), (4, "codistillation")]
)
def test_codistillation_sends_weights_now_and_then_and_no_outputs(found, count, case):
    number = PLAN.index((count, case, False, [f"data=1,peer={count}"]))
    sent = torch.load(found / f"{number}.pt", weights_only=False)["sent"]
    assert "peer: outputs" not in sent
    snapshots = 1 + 20 // 3  # at the start, and every 3 of 20 steps
    state = reference(case, 1, count)["state"]["peers"]
    numbers = sum(v.numel() for k, v in state.items() if k.startswith("members.0") and "num_batches" not in k)
    assert sent["peer: snapshots"] == snapshots * numbers * 8 * (count - 1)


@pytest.mark.slow
def test_the_axis_data_sends_every_gradient_once(found):
    number = PLAN.index((2, "dml, okddip_code", False, ["data=2,peer=1"]))
    sent = torch.load(found / f"{number}.pt", weights_only=False)["sent"]
    numbers = sum(
        v.numel() for k, v in reference("kd", 1, 2)["state"]["peers"].items() if k.endswith(("weight", "bias"))
    )
    assert sent["data: gradients"] == 20 * numbers * 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--mesh data=2,pear=2", '"pear=2" is no axis; give data=D,peer=P'),
        ("--mesh data=0", '"data=0" is no axis'),
        ("--mesh peer=2,peer=2", '"peer=2" is no axis'),
        ("--mesh peer=3", "4 peers cannot be shared out evenly among 3 processes"),
        ("--mesh data=2,peer=2 --topology branches", "branches share a trunk"),
        ("--mesh data=256", "--batch-size 128 leaves processes without samples"),
        ("--mesh data=2,peer=2", "takes 4 processes, and there are 1; start them with torchrun --nproc-per-node 4"),
        ("--collective-timeout 0", "give 1 second or more"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(words, sentence, capsys, tmp_path):
    assert main(["train", "okddip", "--model", "resnet8", "--out", str(tmp_path / "run"), *words.split()]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mesh_must_match_the_number_of_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="torchrun started 4 processes; say what they share with --mesh"):
        init_mesh(Config().resolved(), torch.device("cpu"))
    with pytest.raises(InputError, match="takes 2 processes, and there are 4; give a mesh of 4, or"):
        init_mesh(Config(mesh="peer=2").resolved(), torch.device("cpu"))


def test_a_missing_backend_is_named(monkeypatch):
    with pytest.raises(InputError, match="--mesh on --device mps needs CPUs or CUDA GPUs; give --device cpu"):
        backend_for(torch.device("mps"))
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(InputError, match="needs a torch built with NCCL"):
        backend_for(torch.device("cuda"))
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    with pytest.raises(InputError, match=r"torch built with torch\.distributed and gloo"):
        backend_for(torch.device("cpu"))


def test_one_process_needs_no_mesh_and_compare_takes_none(tmp_path, capsys):
    assert isinstance(init_mesh(Config(mesh="data=1,peer=1").resolved(), torch.device("cpu")), SingleProcess)
    assert not torch.distributed.is_initialized()
    assert main(["compare", "okddip", "--mesh", "peer=2", "--out", str(tmp_path / "grid")]) == 2
    assert "drop --mesh" in capsys.readouterr().err


def test_parts_of_a_batch_make_up_the_batch():
    t = build_run(config("pcl", peers=2))
    whole = list(t.loader.epoch(1))
    for parts in (2, 4):
        pieces = []
        for index in range(parts):
            loader = build_run(config("pcl", peers=2)).loader
            loader.shard(index, parts, range(1, 2))
            pieces.append(list(loader.epoch(1)))
        for number, (views, targets) in enumerate(whole):
            sizes = share_out(len(targets), parts)
            own = torch.cat([pieces[i][number][0][:, : sizes[i]] for i in range(parts)], 1)
            assert torch.equal(own, views[1:2])
            assert all(torch.equal(pieces[i][number][1], targets) for i in range(parts))


def test_recomputed_activations_change_no_digit():
    states = []
    for again in (False, True):
        t = build_run(config("pcl", peers=2, checkpoint_activations=again))
        run_steps(t, 4)
        states.append(checkpoint_state(t))
    assert largest_difference(*states) == 0.0


@pytest.mark.slow
def test_recomputed_activations_need_less_memory():
    kept = []
    for again in (False, True):
        t = build_run(config("independent", peers=2, checkpoint_activations=again))
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.data_ptr()] = x.numel()
            return x

        t.peers.train()
        views = t.loader.sample_batch()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = t.peers(views)
        kept.append(sum(sizes.values()))
        del outputs
    assert kept[1] < kept[0] / 5


def test_the_rate_scales_with_the_batch():
    assert learning_rate_at(Config(lr=0.1, batch_size=1024, lr_base_batch=256), 0) == pytest.approx(0.4)
    warm = Config(lr=0.1, batch_size=1024, lr_base_batch=256, warmup_epochs=5, epochs=90).resolved()
    assert learning_rate_at(warm, 0, 0, 10) < 0.01
    assert learning_rate_at(warm, 5) == pytest.approx(0.4)


@pytest.mark.parametrize("words", ["--topology branches", "--execution stacked"])
def test_only_networks_recompute(words, capsys):
    assert main(["train", "okddip", "--checkpoint-activations", *words.split()]) == 2
    assert "drop one of the two" in capsys.readouterr().err


def test_unequal_work_along_peer_is_spoken_of():
    peers = Peers2()
    said = describe_imbalance(peers, torch.zeros(1, 3, 8, 8))
    assert "the members on peer=1 cost 3.0 times those on peer=0, which will wait" in said
    peers.mesh.factor = 1
    assert describe_imbalance(peers, torch.zeros(1, 3, 8, 8)) is None


def test_a_member_on_another_rank_is_refused():
    class SecondRank:
        num_peer, local_members = 2, range(2, 4)

        def all_gather_object(self, value):
            return [value, value]

    local = NetworkPeers("resnet8", 2, 10, image_size=8, first=2)
    peers = MeshPeers(local, SecondRank())
    assert peers.num_peers == 4
    assert peers.local is local
    assert local.local is local
    assert peers.member(3) is local.member(1)
    with pytest.raises(InputError, match="member 1 is on another rank; load the run folder in one process"):
        peers.export_member(1)


class Peers2(torch.nn.Module):
    """Stands in for the peers of one rank, of which the next rank has three times the work."""

    class Mesh:
        num_peer, factor = 2, 3

        def all_gather_object(self, value):
            assert value > 0
            return [value, value * self.factor]

    def __init__(self):
        super().__init__()
        self.mesh = self.Mesh()
        self.local = NetworkPeers("resnet8", 1, 10, image_size=8)
