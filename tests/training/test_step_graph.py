"""A captured step gives the eager step's numbers: its buffers, gradients, shapes and failures, with a capture made of
the CPU. tests/training/test_cuda.py tests CUDA itself.

`CODISTILL_ALL_GRAPHS=1 pytest tests/training/test_step_graph.py` compares every method in every topology, as a loop and
stacked, each with five sets of options.
"""

import itertools
import os
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codistill.config.config import Config
from codistill.config.methods import METHODS, method_config
from codistill.training.build import build_run
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.step_graph import WARM_UP, StepGraph
from codistill.utils import InputError
from helpers.common import close
from helpers.host_reads import CountHostReads


class Recorder(TorchDispatchMode):
    """Records operators with the very tensors that they read and write, as a capture does; `replay` runs them again.

    What Python computed in between is fixed, as in a CUDA graph: numbers, shapes, and which operators run.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(func) for name in CountHostReads.READS):
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = func(*args, **kwargs)
        storages = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        is_new = [x.untyped_storage()._cdata not in storages for x in made]
        if func._schema.is_mutable or any(is_new) or not made:  # else a view, which needs no kernel
            self.calls.append((func, args, kwargs, made, is_new))
        return outputs

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, made, is_new in self.calls:
                again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
                for old, new, to_write in zip(made, again, is_new, strict=True):
                    if to_write:
                        old.detach().copy_(new)


class SimulatedGraph(StepGraph):
    """Captures by recording the operators of a step on the CPU.

    As on a GPU, a capture computes nothing: weights, buffers and the random state are put back.
    """

    def __init__(self, training, error=None):
        super().__init__(p for group in training.optimizers[0].param_groups for p in group["params"])
        self.training, self.error, self.replays = training, error, 0

    def capture(self, run):
        if self.error is not None:
            self.parameters[0].grad = torch.ones_like(self.parameters[0])  # a capture may fail half-way
            raise self.error
        modules = [self.training.peers, self.training.method, self.training.previous]
        tensors = [x for m in modules if m is not None for x in (*m.parameters(), *m.buffers())]
        kept, state = [x.detach().clone() for x in tensors], torch.get_rng_state()
        with Recorder() as recorder:
            outputs = run()
        with torch.no_grad():
            torch._foreach_copy_(tensors, kept)
        torch.set_rng_state(state)

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, outputs


def build(name, topology="networks", **options):
    method = method_config(name)
    for key in [k for k in options if hasattr(method, k)]:
        setattr(method, key, options.pop(key))
    values = {"model": "resnet8", "data": "digits", "train_per_class": 5, "batch_size": 16, "epochs": 6, "peers": 3}
    t = build_run(Config(method, topology=topology, **values | options).resolved())
    t.peers.train()
    return t


def run_steps(t, epochs=5):
    """Train as the loop does, with another distillation weight every epoch; return the terms of the last step."""
    terms = {}
    for epoch in range(epochs):
        t.progress.epoch, t.progress.sums = epoch, zero_sums(t)
        for step, batch in enumerate(t.loader.epoch(epoch)):
            t.progress.step = step
            terms = train_step(t, *batch, 0.1 + 0.2 * epoch)
    return terms


CASES = [
    ("okddip", "networks", {}),
    ("okddip", "branches", {"execution": "stacked"}),
    ("cl_ilr", "branches", {"accumulate": 2}),
    ("dlb", "networks", {"peers": 1}),
]
SLOW_CASES = [
    ("okddip", "networks", {"ablation": "random"}),
    ("pcl", "branches", {}),
    ("one", "branches", {"label_smoothing": 0.1}),
    ("kdcl", "networks", {"target": "linear"}),
    ("independent", "networks", {"mixup": 0.2, "cutmix": 1.0}),
    ("dml", "networks", {"update": "joint", "skip_nonfinite": 2}),
    ("dml", "networks", {"update": "joint", "divergence": "dkd"}),
    ("kdcl", "networks", {"target": "minlogit", "divergence": "dist", "temperature": 1.0}),
    ("okddip", "networks", {"execution": "stacked", "dtype": "bfloat16"}),
    ("pcl", "branches", {"dtype": "bfloat16"}),
    ("codistillation", "networks", {"interval": 2, "burn_in_epochs": 1.0}),
    ("codistillation", "networks", {"interval": 2, "burn_in_epochs": 0.0, "partition": "disjoint"}),
    ("codistillation", "branches", {"interval": 2, "burn_in_epochs": 0.0, "execution": "stacked"}),
    ("switokd", "networks", {"peers": 2}),
    ("switokd", "networks", {"students": 2}),
    ("mcl", "networks", {"logit_weight": 1.0}),
    ("hssakd", "networks", {"exits": 2}),
    ("l_mcl", "networks", {}),
    ("l_mcl", "networks", {"match": "learned", "match_interval": 2, "exits": 1}),
    ("ffsd", "networks", {}),
    ("ffsd", "networks", {"feature_terms": False, "leader": False}),
    ("cosub", "twins", {"peers": 2, "model": ("helpers.cuda_networks:Noisy",)}),
    ("okdph", "networks", {"interval": 2}),
    ("okdph", "networks", {"variant": "authors", "interval": 2, "shares": "dirichlet"}),
    ("independent", "networks", {"auto_augment": "randaugment", "random_erasing": 0.5}),
    ("okddip", "networks", {"freeze": ("conv1",), "head_lr_scale": 2.0, "optimizer": "adamw"}),
]


def every_case():
    """Return all methods but kd, which needs a teacher, in all topologies and ways to run."""
    cases = []
    sets = ({}, {"dtype": "bfloat16"}, {"skip_nonfinite": 2}, {"accumulate": 2}, {"mixup": 0.3})
    for (name, config), execution, more in itertools.product(METHODS.items(), ("loop", "stacked"), sets):
        for topology in config.topologies if name != "kd" else ():
            options = {"execution": execution, "peers": min(3, config.max_peers or 3), **more}
            options |= {"update": "joint"} if name == "dml" else {}
            options |= {"model": ("helpers.cuda_networks:Noisy",)} if topology == "twins" else {}
            cases.append((name, topology, options))
    return cases


ALL_CASES = every_case() if "CODISTILL_ALL_GRAPHS" in os.environ else []


@pytest.mark.parametrize(
    ("name", "topology", "options"),
    [*CASES, *ALL_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_captured_steps_give_the_eager_numbers(name, topology, options):
    try:
        eager, graphed = build(name, topology, **options), build(name, topology, **options)
    except InputError as refused:
        if (name, topology, options) not in ALL_CASES:
            raise
        pytest.skip(str(refused))
    assert eager.graph is None  # the CPU has none
    graphed.graph = SimulatedGraph(graphed)
    state = torch.get_rng_state()
    expected = run_steps(eager)
    torch.set_rng_state(state)
    terms = run_steps(graphed)
    steps = 5 * len(eager.loader)
    shapes = 2 if "partition" not in options else 1  # 50 images, 16 a batch: the last one has 2; or 3 x 16
    alone = eager.previous is not None  # the first step has no batch before it, and the others have two sizes of it
    assert len(graphed.graph.captured) == shapes + alone
    assert graphed.graph.replays == steps - (shapes + alone) * WARM_UP - alone
    for key, value in expected.items():
        assert torch.equal(terms[key], value), key
    for part in ("peers", "method", "ema", "sums"):
        captured = checkpoint_state(graphed)[part]
        for key, value in (checkpoint_state(eager)[part] or {}).items():
            assert torch.equal(captured[key], value), (part, key)
    for ours, theirs in zip(*([] if t.previous is None else t.previous.buffers() for t in (graphed, eager))):
        assert torch.equal(ours, theirs)
    assert torch.equal(graphed.guard.terms, eager.guard.terms)
    assert int(graphed.guard.steps_good) == steps


def test_a_step_that_cannot_be_captured_stays_eager():
    eager, graphed = build("okddip"), build("okddip")
    graphed.graph = SimulatedGraph(graphed, RuntimeError("operation not permitted\nwhen stream is capturing"))
    run_steps(eager)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_steps(graphed)
    told = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(told) == 1
    assert "(operation not permitted)" in told[0]
    assert "--no-cuda-graph" in told[0]
    assert not graphed.graph.captured
    for key, value in eager.peers.state_dict().items():
        assert torch.equal(graphed.peers.state_dict()[key], value), key


def test_a_bad_step_is_found_in_a_replay():
    t = build("okddip", batch_size=20, lr=0.01)
    t.graph = SimulatedGraph(t)
    run_steps(t, 2)
    before = [p.detach().clone() for p in t.peers.parameters()]
    views, targets = next(t.loader.epoch(0))
    train_step(t, views * torch.nan, targets, 1.0)
    assert t.graph.replays == 2
    steps, terms = t.guard.check_finite()
    assert steps == 6
    assert terms["loss"] != terms["loss"]
    for parameter, held in zip(t.peers.parameters(), before):
        close(parameter.detach(), held, 0.0)
