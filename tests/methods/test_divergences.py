"""The divergences against loops and the authors' numbers, in every method that has a target."""

import math

import numpy as np
import pytest
import torch

from codistill.config import DMLConfig, method_config
from codistill.losses import kl_divergence, soften
from codistill.methods import CLILR, DML, KD, KDCL, ONE, PCL, Divergence, OKDDip
from codistill.methods.divergence import standardize_logits
from codistill.peers import PeerOutputs
from codistill.utils import InputError
from helpers import oracles
from helpers.common import GOLDEN, close, random_peers
from helpers.runs import tiny

KINDS = ["kl", "dkd", "dist", "reverse_kl", "js", "mse"]
WEIGHTS = {"dkd": (0.5, 2.0), "dist": (2.0, 0.5)}

kinds = pytest.mark.parametrize("kind", KINDS)
others = pytest.mark.parametrize(
    "how", [{"divergence": k} for k in KINDS[1:]] + [{"divergence": k, "standardize_logits": True} for k in KINDS]
)


def build(temperature=2.0, **options):
    return Divergence(DMLConfig(**options), temperature)


def compare(ours, naive, inputs):
    close(ours, naive)
    given = torch.autograd.grad(ours, inputs, allow_unused=True)
    wanted = torch.autograd.grad(naive, inputs, allow_unused=True)
    for a, b in zip(given, wanted):
        close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)


@kinds
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_equals_the_loop_with_gradients_on_both_sides(kind, standardize, weights):
    z, _, y = random_peers(num_peers=2)
    pair = WEIGHTS.get(kind, ()) if weights else ()
    measure = build(divergence=kind, standardize_logits=standardize, divergence_weights=pair)
    ours = measure(z[0], soften(z[1], 2.0), y)
    naive = oracles.divergence(z[0], z[1], y, kind=kind, temperature=2.0, standardize=standardize, weights=pair or None)
    compare(ours, naive, [z])


@pytest.mark.parametrize("kind", ["dkd", "reverse_kl", "js"])
def test_large_logits_stay_exact(kind):
    z, _, y = random_peers(num_peers=2, scale=100.0)
    ours = build(divergence=kind)(z[0], soften(z[1], 2.0), y)
    compare(ours, oracles.divergence(z[0], z[1], y, kind=kind, temperature=2.0), [z])


def test_dkd_gives_the_authors_number():
    with np.load(GOLDEN.parent / "next.npz") as archive:
        student, teacher, labels, expected = (
            torch.tensor(archive[f"dkd_{name}"]) for name in ("student", "teacher", "labels", "ls0")
        )
    close(build(4.0, divergence="dkd")(student, soften(teacher, 4.0), labels), expected)


def test_divergences_have_their_known_properties():
    z, _, y = random_peers(num_peers=2)
    log_t = soften(z[1], 2.0)
    for kind in KINDS:  # 0 at the target; a constant added to a sample's logits changes nothing
        measure = build(divergence=kind)
        assert measure(z[1], log_t, y).abs() < 1e-5  # the 1e-8 of dist beside small norms
        close(measure(z[0] + 5, log_t, y), measure(z[0], log_t, y))
        scaled = build(divergence=kind, standardize_logits=True)
        close(scaled(z[0] * 7, log_t, y), scaled(z[0], log_t, y), 1e-5)
    js = build(1.0, divergence="js")(torch.tensor([[200.0, 0.0]]), torch.tensor([[-200.0, 0.0]]), y[:1])
    assert js.item() == pytest.approx(math.log(2))  # the largest value
    far = 1e4  # T^2 KL tends to half the squared differences
    close(kl_divergence(z[0], z[1], far), build(divergence="mse")(z[0], log_t, y) / 2, 1e-3)
    close(standardize_logits(z).std(-1), torch.ones(2, 5, dtype=torch.float64), 1e-6)


def test_kl_alone_is_what_it_was():
    z, _, y = random_peers(num_peers=2)
    assert torch.equal(build()(z[0], soften(z[1], 2.0), y), kl_divergence(z[0], z[1], 2.0))


@kinds
@pytest.mark.parametrize("standardize", [False, True])
def test_pairwise_is_the_sum_over_the_others(kind, standardize):
    z, _, y = random_peers(num_peers=3)
    ours = build(divergence=kind, standardize_logits=standardize).pairwise(z, z, y)
    how = {"kind": kind, "temperature": 2.0, "standardize": standardize}
    naive = [sum(oracles.divergence(z[i], z[j], y, **how) for j in range(3) if j != i) for i in range(3)]
    compare(ours.sum(), sum(naive), [z])
    close(ours, torch.stack(naive))


@others
def test_every_method_compares_each_student_with_its_target(how):
    z, h, y = random_peers(num_peers=3, batch=3, classes=5)
    fixed, outputs = z.detach(), PeerOutputs(z, h)
    kind = {"kind": how["divergence"], "standardize": how.get("standardize_logits", False)}
    mean = {i: [oracles.others_mean(fixed, i)] for i in range(3)}
    teacher = torch.randn(3, 5, dtype=torch.float64)

    def expect(terms, targets, temperature, **weights):
        compare(terms["loss"], oracles.with_divergence(z, y, targets, temperature=temperature, **weights, **kind), [z])

    terms = KD(3, **how)(PeerOutputs(z, h, teacher_logits_BC=teacher), y)
    expect(terms, {i: [teacher] for i in range(3)}, 4.0, ce_weight=0.1, weight=0.9)
    expect(DML(3, target="mean", **how)(outputs, y), mean, 1.0)
    pairs = {i: [fixed[j] for j in range(3) if j != i] for i in range(3)}
    expect(DML(3, **how)(outputs, y), pairs, 1.0, weight=0.5)
    expect(DML(3, "authors", **how)(outputs, y), pairs, 1.0)
    live = {i: [oracles.others_mean(z, i)] for i in range(3)}
    expect(DML(3, "okddip_code", "mean", **how)(outputs, y), live, 3.0)
    expect(CLILR(3, **how)(outputs, y), mean, 2.0, ce_weight=0.5, weight=0.5)
    best = fixed.logsumexp(-1) - fixed.gather(-1, y.expand(3, 3).unsqueeze(-1)).squeeze(-1)
    naive = torch.stack([fixed[int(best[:, b].argmin()), b] for b in range(3)])
    expect(KDCL(3, target="naive", **how)(outputs, y), {i: [naive] for i in range(3)}, 2.0)
    method = PCL(3, [16, 16, 16], 5, **how).double()
    logits = torch.cat(h, 1).detach() @ method.classifier.weight.t() + method.classifier.bias
    ema = fixed.roll(1, 0)
    terms = method(PeerOutputs(z, h, ema_logits_PBC=ema), y)
    own = sum(
        oracles.divergence(z[i], logits.detach(), y, temperature=3.0, **kind)
        + sum(oracles.divergence(z[i], ema[j], y, temperature=3.0, **kind) for j in range(3) if j != i) / 2
        for i in range(3)
    )
    compare(terms["loss"], own + sum(oracles.ce(z[i], y) for i in range(3)) + oracles.ce(logits, y), [z])


@others
def test_okddip_and_one_compare_with_their_mixtures(how):
    z, h, y = random_peers(num_peers=3, batch=3, classes=5)
    kind = {"kind": how["divergence"], "standardize": how.get("standardize_logits", False)}
    method = OKDDip(3, 16, detach="all", ablation="mean", **how)
    log_mean = (z.detach()[:2] / 3).softmax(-1).mean(0).log()
    naive = oracles.with_divergence(z, y, {i: [3 * log_mean] for i in range(3)}, temperature=3.0, **kind)
    compare(method(PeerOutputs(z, h), y)["loss"], naive, [z])
    code = OKDDip(3, 16, "okddip_code", ablation="mean", **how)
    live = z[:2].mean(0)
    naive = oracles.with_divergence(z, y, {i: [live] for i in range(3)}, temperature=3.0, **kind)
    compare(code(PeerOutputs(z, h), y)["loss"], naive, [z])
    gate = torch.randn(3, 3, dtype=torch.float64)
    terms = ONE(3, 6, **how).double().distil(z, gate, y)
    mixed = (gate.softmax(-1).t().unsqueeze(-1) * z).sum(0)
    naive = oracles.with_divergence(z, y, {i: [mixed.detach()] for i in range(3)}, temperature=3.0, **kind)
    compare(terms["loss"], naive + oracles.ce(mixed, y), [z])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": method_config("dml"), "divergence": "dkd", "mixup": 0.2}, "--mixup makes labels soft"),
        ({"method": method_config("dml"), "divergence_weights": (1.0, 2.0)}, "--method.divergence kl has none"),
        ({"method": method_config("pcl"), "divergence": "dist", "divergence_weights": (1.0,)}, "takes two numbers"),
        ({"method": method_config("kd"), "divergence": "dkd", "divergence_weights": (-1.0, 1.0)}, "0 or more, each"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    method = options.pop("method")
    for name in [name for name in options if name.startswith("divergence")]:
        setattr(method, name, options.pop(name))
    with pytest.raises(InputError, match=words):
        tiny(method=method, **options).resolved()


def test_dist_asks_for_the_full_batch_and_refuses_microbatches():
    from helpers.method_cases import build as build_run

    with pytest.raises(InputError, match="--accumulate: dml needs the full batch"):
        build_run("dml", {"divergence": "dist", "update": "joint"}, "networks", accumulate=2)
    methods = [
        DML(2, divergence="dist"),
        CLILR(2, divergence="dist"),
        KDCL(2, divergence="dist"),
        KD(divergence="dist"),
    ]
    assert all(method.needs_full_batch for method in [*methods, PCL(2, [4, 4], 5, divergence="dist")])
    assert OKDDip(3, 8, divergence="dist").needs_full_batch
    assert not OKDDip(3, 8).needs_full_batch


def test_dkd_refuses_soft_labels_given_to_the_method():
    z, h, y = random_peers(num_peers=2)
    soft = torch.nn.functional.one_hot(y, 7).double()
    with pytest.raises(InputError, match="one hard label"):
        DML(2, divergence="dkd")(PeerOutputs(z, h), soft)
