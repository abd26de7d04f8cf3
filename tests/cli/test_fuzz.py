"""Some hundred cases of benchmarks/fuzz.py, and losses and methods on logits that no network should give."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fuzz
from codistill import losses
from codistill.training.step import forward_all, train_step
from helpers.method_cases import CASES, EXTRA, build, every

few = settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")


@pytest.mark.slow
@few
@given(fuzz.CONFIGS)
@example({"method": []})
@example({"method": {"name": None}})
@example({"epochs": 10**400})
@example({"lr": 10**400})
@example({"method": {"name": "kdcl", "holdout_fraction": 10**400}})
def test_no_config_ends_in_a_traceback(values):
    fuzz.try_config(values)


@pytest.mark.slow
@few
@given(fuzz.FILES, st.sampled_from([".json", ".toml"]))
@example(b"[" * 100_000, ".json")
def test_no_config_file_ends_in_a_traceback(tmp_path_factory, content, suffix):
    fuzz.try_file(content, tmp_path_factory.getbasetemp(), suffix)


@pytest.mark.slow
@few
@given(fuzz.COMMAND_LINES)
@example(["train", "okddip", "--epochs", "9" * 400])
@example(["train", "okddip", "--out", "\udcff"])
def test_no_command_line_ends_in_a_traceback(words):
    fuzz.try_command_line(words)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    place = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        fuzz.make_run_folders(place)
    return place


@pytest.mark.slow
@few
@given(fuzz.RUN_FILES)
@example(("run", "result.json", "report {run} -o out.html", ("bytes", [], b"[" * 200_000)))
@example(("run", "last.pt", "predict {run} image.png", ("fifo", [], None)))
@example(("grid", "grid.json", "compare independent {small} --seeds 1 --out {grid}", ("replace", [2], 10**9)))
def test_no_file_of_a_run_ends_in_a_traceback(originals, case):
    with fuzz.only_reading():
        fuzz.try_run_files(case, originals)


# Half precision ends at 65504, and T^2 times a divergence must fit; training computes losses in float32 or wider.
LARGEST = {torch.float16: 50.0, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e290}


@st.composite
def strange_logits(draw, shape):
    """Logits that are equal, tiny, huge, of a single winner, or all at once, in any precision."""
    dtype = draw(st.sampled_from([*LARGEST]))
    kind = draw(st.sampled_from(["normal", "equal", "one winner", "mixed"]))
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-4, 1.0, 50.0, LARGEST[dtype]]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(shape, dtype=torch.float64).clamp(-1, 1)
    if kind == "equal":
        x = torch.ones(shape, dtype=torch.float64)
    elif kind == "one winner":
        x = -torch.ones(shape, dtype=torch.float64)
        x[..., 0] = 1
    elif kind == "mixed":
        x = x * torch.tensor([0.0, 1e-6, 1.0])[torch.randint(3, shape)]
    return (x * scale).to(dtype).requires_grad_()


@pytest.mark.slow
@few
@given(st.data(), st.sampled_from([1, 2, 7]), st.sampled_from([0.5, 1.0, 20.0]))
def test_losses_and_gradients_of_extreme_logits_are_finite(data, classes, temperature):
    shape = (3, 4, classes)
    logits, others = data.draw(strange_logits(shape)), data.draw(strange_logits(shape))
    others = others.to(logits.dtype).clamp(-LARGEST[logits.dtype], LARGEST[logits.dtype]).detach()
    targets = torch.randint(classes, (4,))
    values = {
        "cross_entropy": losses.cross_entropy(logits, targets),
        "kl_divergence": losses.kl_divergence(logits, others, temperature),
        "entropy": losses.entropy(logits),
        "peer_distance": losses.peer_distance(logits.softmax(-1), 1e-12),
    }
    for name, value in values.items():
        assert value.isfinite().all(), (name, logits, others)
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert gradient.isfinite().all(), (name, logits, others)


@pytest.mark.slow
@every
def test_methods_on_strange_logits_stay_finite(name, options, topology):
    t = build(name, options, topology)
    batches = t.loader.epoch(0)
    if t.previous is not None:  # it learns from the batch before, too
        train_step(t, *next(batches), 1.0)
    views, targets = next(batches)
    outputs = forward_all(t, views)
    plain = outputs.logits_PBC.detach()
    winner = torch.full_like(plain, -1e3)
    winner[..., 3] = 1e3
    cases = {"equal": torch.zeros_like(plain), "tiny": plain * 1e-30, "large": plain * 1e3, "one class": winner}
    cases |= {"half precision": plain.half().float(), "one peer wins": plain.clone()}
    cases["one peer wins"][0] *= 1e3
    for case, logits in cases.items():
        outputs.logits_PBC = logits.clone().requires_grad_()
        if t.ema is not None:
            outputs.ema_logits_PBC = logits
        terms = t.method(outputs, targets, 1.0)
        assert all(term.isfinite().all() for term in terms.values()), case
        (gradient,) = torch.autograd.grad(terms["loss"], outputs.logits_PBC)
        assert gradient.isfinite().all(), case


def test_every_method_is_tried():
    assert {name for name, _, _ in CASES + EXTRA} == {*fuzz.METHODS}
