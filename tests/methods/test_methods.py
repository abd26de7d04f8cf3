"""Every method but OKDDip (which has its own file) against loops written from the equations, and golden numbers."""

import dataclasses
import inspect
import itertools

import pytest
import torch
from scipy import optimize

from codistill.config.config import Config
from codistill.config.methods import METHODS, CLILRConfig, DivergenceConfig, ONEConfig, TeacherConfig
from codistill.losses import cross_entropy, kl_from_log_probs, soften
from codistill.methods import (
    CLASSES,
    CLILR,
    DML,
    KD,
    KDCL,
    ONE,
    PCL,
    Independent,
    Method,
    OKDDip,
    PeerInfo,
    build_method,
)
from codistill.methods.simplex import best_mixture, frank_wolfe_gap, quadratic_on_simplex
from codistill.peers import BranchPeers, NetworkPeers
from codistill.peers.base import PeerOutputs
from codistill.utils.errors import InputError
from helpers import oracles
from helpers.common import close, golden, random_peers


def all_reduce_flag(loss, naive, inputs, tolerance=1e-10):
    """Compare values, and gradients with respect to every input."""
    close(loss, naive, tolerance)
    ours = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(naive, inputs, allow_unused=True)
    for a, b in zip(ours, theirs):
        close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b, tolerance)


def gradient_matches(loss, z, expected):
    close(torch.autograd.grad(loss, z, retain_graph=True)[0], expected, 1e-9)


scales = pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])


def test_independent_is_the_sum_of_cross_entropies():
    z, h, y = random_peers()
    terms = Independent(4)(PeerOutputs(z, h), y)
    all_reduce_flag(terms["loss"], sum(oracles.ce(z[p], y) for p in range(4)), [z])
    assert terms["distill_P"].abs().sum() == 0


@scales
@pytest.mark.parametrize(("variant", "temperature", "alpha"), [("paper", 4.0, 0.9), ("okddip_code", 3.0, 1.0)])
def test_kd_equals_the_loop_and_takes_the_sources_defaults(scale, variant, temperature, alpha):
    z, h, y = random_peers(num_peers=2, scale=scale)
    teacher = z.detach()[1].roll(1, 0).requires_grad_()
    terms = KD(2, variant)(PeerOutputs(z, h, teacher_logits_BC=teacher), y)
    naive = oracles.kd(z, teacher, y, variant=variant, temperature=temperature, alpha=alpha)
    all_reduce_flag(terms["loss"], naive, [z])
    assert torch.autograd.grad(terms["loss"], teacher, allow_unused=True)[0] is None


@scales
@pytest.mark.parametrize("variant", ["paper", "authors", "okddip_code"])
@pytest.mark.parametrize("target", ["pairwise", "mean"])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_dml_equals_the_loop(scale, variant, target, temperature):
    z, h, y = random_peers(num_peers=3, batch=3, classes=5, scale=scale)
    terms = DML(3, variant, target, temperature)(PeerOutputs(z, h), y)
    used = temperature or {"okddip_code": 3.0}.get(variant, 1.0)
    all_reduce_flag(terms["loss"], oracles.dml(z, y, variant=variant, target=target, temperature=used, weight=1.0), [z])


def test_dml_updates_as_its_sources_do():
    modes = [DML(2, v).update_mode for v in ("paper", "authors", "okddip_code")]
    assert modes == ["alternating", "alternating", "joint"]
    assert DML(2, update="joint").update_mode == "joint"


def test_methods_of_users_may_use_the_old_name_of_update_mode():
    class OfClass(Method):
        update = "alternating"

    class OfInstance(Method):
        def __init__(self):
            super().__init__(2)
            self.update = "alternating"

    for method in (OfClass(2), OfInstance()):
        assert method.update_mode == method.update_mode == "alternating"
    assert Independent(2).update == "joint"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_options_of_its_config(name):
    """All of them, in their order and with their defaults, but those of a trained teacher; the shared ones last."""
    of_teacher = {field.name for field in dataclasses.fields(TeacherConfig)}
    options = {f.name: f.default for f in dataclasses.fields(METHODS[name]) if f.name not in of_teacher}
    of_peers = {
        "num_peers",
        "feature_dim",
        "feature_dims",
        "exit_dims",
        "map_shapes",
        "trunk_dim",
        "num_classes",
        "seed",
    }
    arguments = inspect.signature(CLASSES[name]).parameters.values()
    assert {a.name: a.default for a in arguments if a.name not in of_peers} == options
    shared = {field.name for field in dataclasses.fields(DivergenceConfig)}
    in_order = sorted(options, key=lambda name: name in shared)
    assert [a.name for a in arguments if a.name not in of_peers] == in_order


def test_defaults_in_python_are_those_of_a_run_of_300_epochs():
    ramps = [OKDDip(3, 8), PCL(2, [4, 4], 5), ONE(2, 4), ONE(2, 4, "authors"), CLILR(2), CLILR(2, "okddip_code")]
    assert [method.ramp_epochs for method in ramps] == [80.0, 80.0, 0.0, 80.0, 0.0, 80.0]
    assert OKDDip(3, 8, ramp_epochs=None).ramp_epochs == 80.0
    assert OKDDip(3, 8, ramp_epochs=7).ramp_epochs == 7
    with pytest.raises(TypeError, match="ramp_epoch"):
        OKDDip(3, 8, ramp_epoch=7)


def test_options_may_be_given_by_their_place_too():
    method = OKDDip(4, 64, "okddip_code", 2.0, 0.5, 10, "all", True, "no_leader", 0.3, 5)
    assert (method.variant, method.temperature, method.weight, method.ramp_epochs) == ("okddip_code", 2.0, 0.5, 10)
    assert (method.detach, method.mask_self, method.ablation, method.entropy_weight) == ("all", True, "no_leader", 0.3)
    assert method.deployed == 1  # seed 5 of 4 members
    kd = KD(2, "okddip_code", 2.0, 0.7)
    assert (kd.temperature, kd.alpha, kd.ce_weight) == (2.0, 0.7, 1.0)


@scales
@pytest.mark.parametrize(("variant", "temperature"), [("paper", 2.0), ("okddip_code", 3.0)])
def test_cl_ilr_equals_the_loop(scale, variant, temperature):
    z, h, y = random_peers(batch=3, classes=5, scale=scale)
    terms = CLILR(4, variant, beta=0.3 if variant == "paper" else 0.5)(PeerOutputs(z, h), y, weight=0.37)
    naive = oracles.cl_ilr(z, y, variant=variant, temperature=temperature, beta=0.3, weight=0.37)
    all_reduce_flag(terms["loss"], naive, [z])


@scales
def test_cl_ilr_without_the_doubtful_square_equals_the_loop(scale):
    z, h, y = random_peers(batch=3, classes=5, scale=scale)
    terms = CLILR(4, beta=0.3, temperature=3.0, temperature_squared=False)(PeerOutputs(z, h), y, weight=0.37)
    how = {"variant": "paper", "temperature": 3.0, "beta": 0.3}
    plain, whole = (oracles.cl_ilr(z, y, weight=weight, **how) for weight in (0.0, 0.37))
    all_reduce_flag(terms["loss"], plain + (whole - plain) / 9, [z])
    with pytest.raises(InputError, match=r"or drop --method\.variant"):
        Config(CLILRConfig(variant="okddip_code", temperature_squared=False)).resolved()


@scales
@pytest.mark.parametrize("variant", ["paper", "authors", "okddip_code"])
def test_one_equals_the_loop_through_the_gate(scale, variant):
    z, h, y = random_peers(num_peers=3, scale=scale)
    trunk = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    method = ONE(3, 6, variant).double()
    method.gate_norm.weight.data.uniform_(0.5, 2)
    method.gate_norm.bias.data.uniform_(-1, 1)
    terms = method(PeerOutputs(z, h, trunk_BD=trunk), y, weight=0.37)
    norm = method.gate_norm
    gate = oracles.one_gate(trunk, method.gate.weight, method.gate.bias, norm.weight, norm.bias)
    naive = oracles.one(z, gate, y, variant=variant, temperature=3.0, weight=0.37)
    all_reduce_flag(terms["loss"], naive, [z, trunk, *method.parameters()])
    close(terms["gate_BP"].sum(-1), torch.ones(5, dtype=torch.float64))


def test_a_detached_teacher_gives_the_gate_no_kd_gradient():
    z, h, y = random_peers(num_peers=3)
    for variant, hears in (("paper", False), ("authors", False), ("okddip_code", True)):
        method = ONE(3, 6, variant).double()
        distill = method(PeerOutputs(z, h, trunk_BD=torch.randn(5, 6, dtype=torch.float64)), y)["loss_P"].sum()
        grad = torch.autograd.grad(distill, method.gate.weight, allow_unused=True)[0]
        assert (grad is not None and grad.abs().max() > 1e-9) == hears


@scales
def test_pcl_equals_the_loop_with_peers_of_different_widths(scale):
    z, h, y = random_peers(num_peers=3, dims=(8, 12, 5), scale=scale)
    ema = (z.detach() + torch.randn_like(z)).requires_grad_()
    method = PCL(3, (8, 12, 5), 7).double()
    terms = method(PeerOutputs(z, h, ema_logits_PBC=ema), y, weight=0.37)
    weight, bias = method.classifier.weight, method.classifier.bias
    naive = oracles.pcl(z, h, ema, weight, bias, y, temperature=3.0, weight=0.37)
    all_reduce_flag(terms["loss"], naive, [z, *h, weight, bias, ema])


@scales
@pytest.mark.parametrize("target", ["naive", "minlogit"])
def test_kdcl_naive_and_minlogit_equal_the_loop(scale, target):
    z, h, y = random_peers(num_peers=3, scale=scale)
    terms = KDCL(3, target)(PeerOutputs(z, h), y)
    all_reduce_flag(terms["loss"], oracles.kdcl(z, y, target=target, temperature=2.0, weight=1.0), [z])


@scales
@pytest.mark.parametrize("granularity", ["sample", "batch"])
def test_kdcl_linear_equals_the_loop_with_its_own_weights(scale, granularity):
    z, h, y = random_peers(num_peers=3, scale=scale)
    terms = KDCL(3, "linear", granularity=granularity)(PeerOutputs(z, h), y)
    all_reduce_flag(
        terms["loss"],
        oracles.kdcl(z, y, target="linear", temperature=2.0, weight=1.0, mixture=terms["weights_BP"]),
        [z],
    )


@scales
@pytest.mark.parametrize("mix", ["probs", "logits"])
def test_kdcl_general_equals_the_loop(scale, mix):
    z, h, y = random_peers(num_peers=3, scale=scale)
    method = KDCL(3, "general", mix=mix).double()
    method.update_on_holdout(torch.randn(3, 40, 7).double(), torch.randint(7, (40,)))
    weights = method.weights_P
    assert weights.std() > 1e-3
    terms = method(PeerOutputs(z, h), y)
    all_reduce_flag(
        terms["loss"], oracles.kdcl(z, y, target="general", temperature=2.0, weight=1.0, mixture=weights, mix=mix), [z]
    )


# -- the authors' numbers ----------------------------------------------------------------------------------------------


def test_golden_one():
    g = golden()
    z, gate = g["logits"].clone().requires_grad_(), g["one_gate_logits"].clone().requires_grad_()
    terms = ONE(4, 8, "okddip_code").distil(z, gate, g["labels"], 0.37)
    close(terms["gate_BP"], g["one_gate"], 1e-12)
    close(terms["ce_P"].sum() + terms["ce_teacher"], g["one_ce"], 1e-9)
    close(terms["distill_P"].sum(), g["one_kl"], 1e-9)
    close(terms["loss"], g["one_loss"], 1e-9)
    gradient_matches(terms["loss"], z, g["one_grad_logits"])
    gradient_matches(terms["loss"], gate, g["one_grad_gate_logits"])


def test_golden_cl_ilr():
    g = golden()
    z = g["logits"].clone().requires_grad_()
    terms = CLILR(4, "okddip_code")(PeerOutputs(z, []), g["labels"], 0.37)
    close(terms["ce_P"].sum(), g["clilr_ce"], 1e-9)
    close(terms["distill_P"].sum(), g["clilr_kl"], 1e-9)
    close(terms["loss"], g["clilr_loss"], 1e-9)
    gradient_matches(terms["loss"], z, g["clilr_grad_logits"])


def test_golden_dml():
    g = golden()
    z = g["logits"].clone().requires_grad_()
    terms = DML(4, "okddip_code", "pairwise")(PeerOutputs(z, []), g["labels"])
    close(terms["ce_P"].sum(), g["dml_ce"], 1e-9)
    close(terms["distill_P"].sum(), g["dml_kl"], 1e-9)
    close(terms["loss"], g["dml_loss"], 1e-9)
    gradient_matches(terms["loss"], z, g["dml_grad_logits"])


def test_golden_kd():
    g = golden()
    z = g["logits"][:1].clone().requires_grad_()
    terms = KD(1, "okddip_code")(PeerOutputs(z, [], teacher_logits_BC=g["logits"][1]), g["labels"])
    close(terms["ce_P"].sum(), g["kd_ce"], 1e-9)
    close(terms["distill_P"].sum(), g["kd_kl"], 1e-9)
    loss = cross_entropy(z, g["labels"]).sum() + kl_from_log_probs(z, soften(g["logits"][1], 3.0), 3.0, 1e-7).sum()
    close(terms["loss"], loss, 1e-12)
    expected = g["kd_grad_logits"]
    whole = torch.autograd.grad(terms["loss"], z, retain_graph=True)[0]
    fits = [whole, torch.zeros_like(g["logits"]).index_copy(0, torch.tensor([0]), whole)]
    assert any(f.shape == expected.shape and torch.allclose(f, expected, rtol=0, atol=1e-9) for f in fits)


# -- KDCL's convex problems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_peers", "scale"), list(itertools.product((2, 3, 5), (1.0, 10.0, 100.0))))
def test_the_linear_mixture_closes_the_frank_wolfe_gap(num_peers, scale):
    rng = torch.Generator().manual_seed(num_peers)
    z = torch.randn(64, num_peers, 20, generator=rng, dtype=torch.float64) * 2 * scale
    y = torch.randint(20, (64,), generator=rng)
    u = z - z.gather(-1, y.view(-1, 1, 1).expand(64, num_peers, 1))
    for problem in (u.unsqueeze(1), u.unsqueeze(0)):
        a = best_mixture(problem)
        assert (a >= 0).all()
        close(a.sum(-1), torch.ones(len(a), dtype=torch.float64))
        assert frank_wolfe_gap(a, problem).max() <= 1e-6


def test_the_linear_mixture_equals_an_independent_solver():
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(8, 3, 6, generator=rng, dtype=torch.float64) * 3
    y = torch.randint(6, (8,), generator=rng)
    u = z - z.gather(-1, y.view(-1, 1, 1).expand(8, 3, 1))
    ours = best_mixture(u.unsqueeze(1))
    for b in range(8):

        def loss(a, b=b):
            mixed = torch.tensor(a, dtype=torch.float64) @ z[b]
            return float(-oracles.log_softmax(mixed)[int(y[b])])

        sums_to_one = {"type": "eq", "fun": lambda a: sum(a) - 1}
        found = optimize.minimize(
            loss, [1 / 3] * 3, bounds=[(0, 1)] * 3, constraints=sums_to_one, method="SLSQP", options={"ftol": 1e-13}
        )
        assert loss(ours[b].tolist()) <= found.fun + 1e-6
        assert loss(ours[b].tolist()) <= min(loss(corner) for corner in torch.eye(3).double().tolist()) + 1e-6


def test_equal_members_and_a_batch_of_one_are_mixed_too():
    z = torch.randn(1, 1, 5, dtype=torch.float64).expand(1, 3, 5)
    u = (z - z[..., 2:3]).unsqueeze(1)
    a = best_mixture(u)
    assert a.isfinite().all()
    assert frank_wolfe_gap(a, u).max() <= 1e-6


def test_minimum_logits_are_at_least_as_right_as_any_member():
    z, _, y = random_peers(num_peers=3, batch=64, scale=3)
    log_t, _ = KDCL(3, "minlogit", temperature=1.0).teacher(z.detach(), y)
    teacher = -log_t.gather(-1, y[:, None]).squeeze(-1)
    members = -z.detach().log_softmax(-1).gather(-1, y.expand(3, -1).unsqueeze(-1)).squeeze(-1)
    assert (teacher <= members.min(0).values + 1e-12).all()


def test_generals_weights_solve_the_quadratic_program():
    rng = torch.Generator().manual_seed(0)
    for trial in range(20):
        factor = torch.randn(4, 6, generator=rng, dtype=torch.float64)
        factor[0] *= 0.3 if trial % 2 else 5.0  # some closed forms leave the simplex
        matrix = factor @ factor.t() + (3.0 if trial % 3 == 0 else 0.0)
        ours = quadratic_on_simplex(matrix)
        array = matrix.numpy()
        sums_to_one = {"type": "eq", "fun": lambda w: sum(w) - 1}
        found = optimize.minimize(
            lambda w, m: w @ m @ w,
            [0.25] * 4,
            args=(array,),
            bounds=[(0, 1)] * 4,
            constraints=sums_to_one,
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        close(ours.sum(), torch.ones((), dtype=torch.float64))
        assert (ours >= 0).all()
        assert float(ours @ matrix @ ours) <= found.fun + 1e-8
    close(quadratic_on_simplex(torch.ones(3, 3)), torch.full((3,), 1 / 3, dtype=torch.float64), 1e-6)


def test_generals_covariance_is_that_of_the_errors():
    method = KDCL(2, "general").double()
    logits, labels = torch.randn(2, 30, 4, dtype=torch.float64), torch.randint(4, (30,))
    method.update_on_holdout(logits, labels)
    error = torch.zeros(2, 30, 4, dtype=torch.float64)
    for i, n in itertools.product(range(2), range(30)):
        probs = [float(torch.exp(v)) for v in oracles.log_softmax(logits[i, n])]
        error[i, n] = torch.tensor(probs, dtype=torch.float64)
        error[i, n, labels[n]] -= 1
    c = [[sum(float(error[i, n] @ error[j, n]) for n in range(30)) / 30 for j in range(2)] for i in range(2)]
    closed = [c[1][1] - c[0][1], c[0][0] - c[0][1]]
    total = sum(closed)
    expected = [max(0.0, min(1.0, v / total)) for v in closed]
    close(method.weights_P, torch.tensor(expected, dtype=torch.float64), 1e-8)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (KD(4), "kd needs a trained teacher; give --method.teacher"),
        (ONE(4, 8), "one needs the shared trunk's output; use BranchPeers"),
        (PCL(4, (8,) * 4, 7), "pcl needs the mean teachers' logits"),
    ],
)
def test_a_method_names_what_it_lacks_and_how_to_give_it(method, sentence):
    z, h, y = random_peers(dims=(8, 8, 8, 8))
    with pytest.raises(InputError, match=sentence):
        method.double()(PeerOutputs(z, h), y)


def test_missing_features_and_a_wrong_number_of_peers_are_named():
    z, _, y = random_peers()
    from codistill.methods import OKDDip

    with pytest.raises(InputError, match="okddip needs the peers' features"):
        OKDDip(4, 16).double()(PeerOutputs(z, []), y)
    with pytest.raises(InputError, match="built for 2 peers, not 4"):
        DML(2)(PeerOutputs(z, []), y)
    with pytest.raises(InputError, match="use --topology branches"):
        ONE.build(ONEConfig(), PeerInfo(3, 10, (8, 8, 8)))


def test_every_config_builds_its_method_with_the_papers_defaults():
    defaults = {"independent": 4, "kd": 1, "dml": 2, "cl_ilr": 4, "one": 3, "okddip": 4, "pcl": 3, "kdcl": 2}
    defaults |= {"codistillation": 2, "switokd": 2, "mcl": 2, "dlb": 1, "hssakd": 2, "l_mcl": 2, "cosub": 2}
    defaults |= {"okdph": 2, "ffsd": 3}
    assert {name: c.default_peers for name, c in METHODS.items()} == defaults


@pytest.mark.parametrize("name", ["independent", "kd", "dml", "kdcl", "cl_ilr", "one", "okddip", "pcl"])
def test_what_is_deployed_is_in_evaluation_mode_and_its_peers_go_on_training(name):
    config = METHODS[name]()
    kind = BranchPeers if config.topologies[0] == "branches" else NetworkPeers
    peers = kind("resnet8", num_peers=max(config.default_peers, 1), num_classes=5, in_channels=1, image_size=8).train()
    student = build_method(config, peers, seed=0).deploy(peers)
    assert not any(module.training for module in student.modules())
    assert all(module.training for module in peers.modules())
