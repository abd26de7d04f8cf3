"""Every method, topology and execution on an NVIDIA GPU gives the CPU's numbers in float64; skipped where none is.

python -m pytest tests/training/test_cuda.py -n 8        # (-n needs pytest-xdist)
"""

import dataclasses
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import codistill.training.loop
from codistill.config.config import Config
from codistill.config.methods import METHODS, KDConfig, method_config
from codistill.data.image_set import ImageSet
from codistill.methods import build_method
from codistill.models.registry import resolve
from codistill.peers.base import PeerOutputs
from codistill.peers.branches import BranchPeers
from codistill.peers.networks import NetworkPeers
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.step_graph import WARM_UP
from codistill.training.summary import holdout_outputs
from codistill.utils.errors import InputError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA can use")

VARIANTS = {
    "independent": [{}],
    "kd": [{}, {"variant": "okddip_code"}, {"divergence": "dist", "temperature": 1.0}],
    "dml": [
        *({}, {"update": "joint"}, {"variant": "authors", "target": "mean"}, {"variant": "okddip_code"}),
        {"update": "joint", "divergence": "dkd"},
    ],
    "cl_ilr": [{}, {"variant": "okddip_code"}, {"divergence": "js"}],
    "one": [{}, {"variant": "authors"}, {"variant": "okddip_code"}, {"divergence": "mse"}],
    "okddip": [
        *({}, {"variant": "okddip_code"}, {"detach": "peers"}, {"detach": "all", "mask_self": True}),
        *({"ablation": ablation} for ablation in ("random", "entropy", "mean", "symmetric", "no_leader")),
        {"divergence": "reverse_kl"},
    ],
    "pcl": [{}, {"own_views": False}, {"divergence": "dist", "temperature": 1.0}],
    "kdcl": [
        *({"target": "minlogit"}, {"target": "naive"}, {"target": "linear"}, {"standardize_logits": True}),
        *({"target": "linear", "granularity": "batch"}, {"target": "minlogit", "own_views": False}),
        *({"target": "general", "holdout_fraction": 0.2, "mix": mix} for mix in ("probs", "logits")),
    ],
    "codistillation": [
        *({"interval": 2}, {"interval": 1, "interval_unit": "epochs", "burn_in_epochs": 1.0}),
        {"interval": 2, "burn_in_epochs": 0.0, "partition": "disjoint"},
    ],
    "ffsd": [{}, {"feature_terms": False}, {"feature_terms": False, "leader": False}],
    "switokd": [{}, {"students": 2}],
    "mcl": [{}, {"logit_weight": 1.0}],
    "dlb": [{}],
    "hssakd": [{}, {"rotations": False, "exits": 2}, {"exits": 0}, {"divergence": "dkd", "exits": 1}],
    "l_mcl": [{}, {"match": "learned", "match_interval": 2, "exits": 1}],
    "cosub": [{}, {"loss": "ce", "own_views": True}],
    "okdph": [
        *({"interval": 2}, {"variant": "authors", "interval": 1}, {"shares": "dirichlet", "label_weight": 0.5}),
        {"interval_unit": "epochs", "interval": 1},
    ],
}
CASES = [
    (name, options, topology)
    for name, variants in VARIANTS.items()
    for options in variants
    for topology in METHODS[name].topologies
]
SEED_METHODS = ("independent", "kd", "dml", "cl_ilr", "one", "okddip", "pcl", "kdcl")
WAYS = [(execution, graph) for execution in ("loop", "stacked") for graph in (False, True)]
OPTIONS = [  # of a run, with a method that each touches
    *({"accumulate": 2}, {"mixup": 0.2}, {"cutmix": 1.0, "mixup": 0.2}, {"label_smoothing": 0.1}, {"cutout": 3}),
    *({"skip_nonfinite": 2}, {"optimizer": "adamw", "lr": 1e-3}, {"freeze": ("conv1",), "head_lr_scale": 2.0}),
    *({"checkpoint_activations": True}, {"channels_last": False}, {"model": ("densenet40_12",), "peers": 3}),
    *({"auto_augment": "randaugment"}, {"auto_augment": "trivialaugment", "random_erasing": 0.5}),
    *({"sam_rho": 0.05}, {"deploy": "ema", "ema_decay": 0.9}, {"deploy": "swa", "swa_start": 0.5}),
]


def images() -> ImageSet:
    """Return 60 images of noise in 5 classes; their 48 training images make batches of 20, 20 and 8."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 5
    pixels = rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    return ImageSet("noise", pixels, labels, pixels, labels, tuple("abcde"))


def config(name, topology=None, options=None, **run) -> Config:
    own = {"model": ("resnet8",), "peers": 3, "epochs": 6, "batch_size": 20, "lr": 0.01, "dtype": "float64"}
    method = dataclasses.replace(method_config(name), **options or {})
    if isinstance(method, KDConfig):
        own["peers"] = 1
    if topology == "twins":
        own["model"] = ("helpers.cuda_networks:Noisy",)  # twins differ by what is random
    own["peers"] = min(own["peers"], method.max_peers or own["peers"])
    return Config(method, topology=topology, val_fraction=0.2, **own | run)


def teacher_for(c: Config) -> nn.Module | None:
    torch.manual_seed(3)
    return resolve("resnet8")(5, 3) if isinstance(c.method, KDConfig) else None


def run_steps(c: Config, device: str, execution: str = "loop", graph: bool = False, epochs: int = 5):
    """Train for some epochs as the loop does, with another weight in each; return the run and the losses."""
    c = dataclasses.replace(c, device=device, execution=execution, cuda_graph=graph)
    t = build_run(c.resolved(), teacher_for(c), data=images())
    t.peers.train()
    t.method.train()
    torch.manual_seed(7)
    losses = []
    for epoch in range(epochs):
        t.progress.epoch, t.progress.sums = epoch, zero_sums(t)
        for step, batch in enumerate(t.loader.epoch(epoch)):
            t.progress.step = step
            losses.append(train_step(t, *batch, 0.1 + 0.2 * epoch)["loss"].detach().cpu().clone())
        if "holdout" in t.method.needs:
            t.method.update_on_holdout(*holdout_outputs(t))
            t.peers.train()
    return t, torch.stack(losses)


def gap(ours: torch.Tensor, theirs: torch.Tensor, least: float = 1e-300) -> float:
    """Return ||ours - theirs|| / ||theirs||, with `least` in place of a smaller norm."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(least)) if theirs.numel() else 0.0


def largest_gap(ours, theirs) -> float:
    """Return the largest relative gap of two runs' states."""
    gaps, states = [0.0], (checkpoint_state(ours), checkpoint_state(theirs))
    for part in ("peers", "method", "ema", "average", "previous", "sums"):
        mine, other = (state.get(part) or {} for state in states)
        assert mine.keys() == other.keys()
        gaps += [gap(mine[key], other[key]) for key in other if isinstance(other[key], torch.Tensor)]
    return max(gaps)


def record(what: str, **figures) -> None:
    """Print a line for whoever keeps the figures (pytest -rP, or -s)."""
    print(f"FIGURE {what}: {json.dumps(figures)}")


def check_captures(t) -> None:
    """Check that a graph was captured for every shape of batch, each after its warm-up."""
    c, (eager, captured) = t.config, (t.graph.eager_steps, t.graph.captured)
    sizes = {min(c.batch_size, t.loader.num_samples), t.loader.num_samples % c.batch_size} - {0}
    if t.previous is None:
        assert len(captured) == len(sizes), eager
        assert set(eager.values()) == {WARM_UP}
        return
    # A shape is that of the batch and of the one before: 20 after 8, 20 after 20 and 8 after 20; first 20 after none.
    assert {key[0] for key in captured} == sizes
    assert sorted(eager.values()) == [1, WARM_UP, WARM_UP, WARM_UP]


def check_ways(c: Config, what: str, reference=None) -> None:
    """Train every way on the GPU, and compare with the CPU (or, where draws differ from the CPU's, the eager loop)."""
    expected, expected_losses = reference or run_steps(c, "cpu")
    if reference is None:
        expected_losses = expected_losses.clone()
    found = {}
    for execution, graph in WAYS:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="the training step cannot be captured")
                t, losses = run_steps(c, "cuda", execution, graph)
        except InputError:
            if execution == "loop":
                raise
            continue
        joint = t.method.update_mode == "joint" and not c.checkpoint_activations and not c.sam_rho
        assert (t.graph is not None) == (graph and joint)
        if t.graph is not None:
            check_captures(t)
        name = f"{execution}{', graph' if t.graph else ''}"
        found[name] = max(gap(losses, expected_losses), largest_gap(t, expected))
    record(what, **found)
    assert found
    assert max(found.values()) < 1e-10, found


@pytest.mark.parametrize(("name", "options", "topology"), CASES, ids=lambda v: json.dumps(v).strip('"'))
def test_a_gpu_trains_as_the_cpu_does(name, options, topology):
    c = config(name, topology, options)
    # On the device, whose random numbers are not the CPU's.
    drawn = options.get("ablation") == "random" or topology == "twins"
    check_ways(c, f"{name} {json.dumps(options)} {topology}", run_steps(c, "cuda") if drawn else None)


@pytest.mark.parametrize("run", OPTIONS, ids=json.dumps)
def test_options_of_a_run(run):
    check_ways(config("okddip" if "mixup" not in run else "independent", "networks", **run), json.dumps(run))


def steps_of(network: str, graph: bool):
    """Train peers of a network in helpers/cuda_networks.py; return the run, the warnings, and what is drawn next."""
    c = config("independent", "networks", model=(f"helpers.cuda_networks:{network}",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t, _ = run_steps(c, "cuda", "loop", graph)
    return t, [str(w.message) for w in caught if "CUDA graph" in str(w.message)], torch.rand(3, device="cuda")


def test_dropout_draws_the_same_numbers_in_a_graph():
    (eager, _, after), (graphed, told, after_graph) = steps_of("Noisy", False), steps_of("Noisy", True)
    assert not told
    assert len(graphed.graph.captured) == 2
    found = largest_gap(graphed, eager)
    record("dropout, graph against eager", gap=found)
    assert found < 1e-10
    assert torch.equal(after, after_graph)  # the generator stands where the eager run has left it


@pytest.mark.parametrize(("network", "why"), [("Reading", "the host waits"), ("Waiting", "captur")])
def test_a_network_that_cannot_be_captured_trains_eagerly(network, why):
    (eager, _, after), (graphed, told, after_graph) = steps_of(network, False), steps_of(network, True)
    record("not capturable", told=told)
    assert why in told[0]
    assert torch.equal(after, after_graph)
    assert len(told) == 1
    assert not graphed.graph.captured
    assert largest_gap(graphed, eager) < 1e-10


class KilledError(Exception):
    """Stands for a kill."""


def run_whole(c: Config, out: Path, killed_at: int | None = None) -> codistill.training.loop.Result:
    """Train from the start, or on from where a kill left it; raise in step `killed_at`, if given."""
    count, step = 0, codistill.training.loop.train_step

    def counted(*arguments):
        nonlocal count
        if count == killed_at:
            raise KilledError
        count += 1
        return step(*arguments)

    codistill.training.loop.train_step = counted
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the training step cannot be captured")
            return codistill.training.loop.train(
                dataclasses.replace(c, out=str(out), resume="auto"), teacher=teacher_for(c), data=images()
            )
    finally:
        codistill.training.loop.train_step = step


RESUMED = [
    *(("okddip", "networks", {}), ("okddip", "branches", {}), ("pcl", "networks", {}), ("one", "branches", {})),
    *(("kdcl", "networks", {"target": "linear"}), ("kdcl", "networks", {"target": "general"})),
    *(("okddip", "networks", {"ablation": "random"}), ("dml", "networks", {}), ("cl_ilr", "branches", {})),
    *(("codistillation", "networks", {"interval": 2}), ("switokd", "networks", {}), ("mcl", "networks", {})),
    *(("dlb", "networks", {}), ("hssakd", "networks", {}), ("cosub", "twins", {})),
    *(("l_mcl", "networks", {}), ("l_mcl", "networks", {"match": "learned", "match_interval": 2})),
    ("ffsd", "networks", {}),
    *(("okdph", "networks", {"interval": 2}), ("okdph", "networks", {"variant": "authors", "interval": 2})),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("name", "topology", "options"), RESUMED, ids=lambda v: json.dumps(v).strip('"'))
def test_a_resumed_run_is_the_whole_one(name, topology, options, way, tmp_path):
    """With deterministic kernels, to the last bit: weights, optimizer, metrics and test figures."""
    execution, graph = way
    run = {"execution": execution, "cuda_graph": graph, "device": "cuda", "deterministic": True, "dtype": "float32"}
    c = config(name, topology, options, checkpoint_every_steps=1, epochs=5, **run)
    try:
        whole = run_whole(c, tmp_path / "whole")
    except InputError:
        if execution == "loop":
            raise
        pytest.skip("not stacked")
    finally:
        torch.use_deterministic_algorithms(False)
    try:
        for killed_at in (4, 6):
            with pytest.raises(KilledError):
                run_whole(c, tmp_path / "again", killed_at)
        again = run_whole(c, tmp_path / "again")
    finally:
        torch.use_deterministic_algorithms(False)
    ours, theirs = again.peers.state_dict(), whole.peers.state_dict()
    gaps = {key: gap(ours[key], theirs[key]) for key in theirs}
    lines = [(tmp_path / part / "metrics.jsonl").read_text().splitlines() for part in ("whole", "again")]
    plain = [[{k: v for k, v in json.loads(line).items() if "second" not in k} for line in part] for part in lines]
    record(f"resumed {name} {json.dumps(options)} {topology} {way}", gap=max(gaps.values()), lines=plain[0] == plain[1])
    assert max(gaps.values()) == 0.0, max(gaps, key=lambda key: gaps[key])
    assert plain[0] == plain[1]
    assert again.figures["test"] == whole.figures["test"]


@pytest.mark.parametrize("topology", ["networks", "branches"])
@pytest.mark.parametrize("name", SEED_METHODS)
def test_heads_give_the_cpus_values_and_gradients(name, topology):
    """Loss, terms, and gradients for logits, features and trunk, with 5 peers and 1,000 classes."""
    if topology not in METHODS[name].topologies:
        pytest.skip("not a topology of the method")
    worst = {}
    for options in VARIANTS[name]:
        if options.get("ablation") == "random":
            continue
        peers = (BranchPeers if topology == "branches" else NetworkPeers)("resnet8", 5, 1000, image_size=8)
        method = build_method(dataclasses.replace(method_config(name), **options), peers).double()
        rng = torch.Generator().manual_seed(1)
        z = torch.randn(5, 16, 1000, generator=rng, dtype=torch.float64) * 5
        h = torch.randn(5, 16, peers.feature_dims[0], generator=rng, dtype=torch.float64)
        trunk = None if peers.trunk_dim is None else torch.randn(16, peers.trunk_dim, generator=rng).double()
        other = torch.randn(5, 16, 1000, generator=rng, dtype=torch.float64)
        labels = torch.randint(1000, (16,), generator=rng)
        found = []
        for device in ("cpu", "cuda"):
            method.to(device).zero_grad()
            method.train()
            leaves = [x.clone().to(device).requires_grad_() for x in (z, h, *([] if trunk is None else [trunk]))]
            heard = PeerOutputs(leaves[0], list(leaves[1]), leaves[2] if trunk is not None else None)
            heard.ema_logits_PBC, heard.teacher_logits_BC = other.to(device), other[0].to(device)
            terms = method(heard, labels.to(device), 0.7)
            terms["loss"].backward()
            gradients = [x.grad for x in (*leaves, *method.parameters())]
            found.append([*terms.values(), *(g for g in gradients if g is not None)])
        assert len(found[0]) == len(found[1])
        # Some gradients are 0 but for rounding: that of a bias before a BatchNorm, say.
        worst[json.dumps(options)] = max(gap(ours, theirs, least=1e-4) for theirs, ours in zip(*found))
    record(f"head {name} {topology}", **worst)
    assert max(worst.values()) < 1e-10, worst
