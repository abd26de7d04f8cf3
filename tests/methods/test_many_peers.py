"""Heads with many peers: the size of the tensors that they make, and their accuracy.

Shapes: P peers, B batch, C classes, D features.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.losses import kl_from_log_probs, kl_of_log_probs, mix_probs, pairwise_kl, peer_distance, soften
from codistill.methods import CLILR, DML, KD, KDCL, ONE, PCL, Independent, OKDDip
from codistill.methods.dml import authors_pairwise_kl
from codistill.peers.base import PeerOutputs
from helpers import oracles
from helpers.common import close, random_peers

HEADS = {
    "independent": lambda p, d, c: Independent(p),
    "kd": lambda p, d, c: KD(p),
    "dml": lambda p, d, c: DML(p),
    "dml authors": lambda p, d, c: DML(p, "authors"),
    "dml okddip_code": lambda p, d, c: DML(p, "okddip_code"),
    "dml mean": lambda p, d, c: DML(p, target="mean"),
    "cl_ilr": lambda p, d, c: CLILR(p),
    "cl_ilr okddip_code": lambda p, d, c: CLILR(p, "okddip_code"),
    "one": lambda p, d, c: ONE(p, d),
    "one okddip_code": lambda p, d, c: ONE(p, d, "okddip_code"),
    "okddip": lambda p, d, c: OKDDip(p, d),
    "okddip masked": lambda p, d, c: OKDDip(p, d, mask_self=True),
    "okddip detached": lambda p, d, c: OKDDip(p, d, detach="all"),
    "okddip okddip_code": lambda p, d, c: OKDDip(p, d, "okddip_code"),
    "okddip no_leader": lambda p, d, c: OKDDip(p, d, ablation="no_leader"),
    "okddip mean": lambda p, d, c: OKDDip(p, d, ablation="mean"),
    "okddip entropy": lambda p, d, c: OKDDip(p, d, ablation="entropy"),
    "pcl": lambda p, d, c: PCL(p, (d,) * p, c),
    "kdcl naive": lambda p, d, c: KDCL(p, "naive"),
    "kdcl minlogit": lambda p, d, c: KDCL(p, "minlogit"),
    "kdcl linear": lambda p, d, c: KDCL(p, "linear"),
    "kdcl linear batch": lambda p, d, c: KDCL(p, "linear", granularity="batch"),
    "kdcl general": lambda p, d, c: KDCL(p, "general"),
    "kdcl general logits": lambda p, d, c: KDCL(p, "general", mix="logits"),
}
heads = pytest.mark.parametrize("name", HEADS)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest output of any operator, but those of the given shapes."""

    def __init__(self, without=()):
        super().__init__()
        self.numel, self.without = 0, without

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.without:
                self.numel = max(self.numel, tensor.numel())
        return result


def outputs_of(num_peers, batch, classes, width, scale=3.0, spread=None, dtype=torch.float32):
    """Outputs of peers, and labels; `spread` is the distance of the peers from one, if they are near each other."""
    z = torch.randn(num_peers, batch, classes) * scale
    ema = torch.randn(num_peers, batch, classes) * scale
    if spread is not None:
        z, ema = z[:1] + spread * torch.randn_like(z), z[:1] + spread * torch.randn_like(z)
    features = [torch.randn(batch, width) for _ in range(num_peers)]
    labels = torch.randint(classes, (batch,))
    outputs = PeerOutputs(z, features, torch.randn(batch, width), teacher_logits_BC=ema[0], ema_logits_PBC=ema)
    return outputs, labels


def converted(outputs, dtype):
    """The outputs in a dtype, as leaves."""
    return PeerOutputs(
        outputs.logits_PBC.detach().to(dtype, copy=True).requires_grad_(),
        [f.detach().to(dtype, copy=True).requires_grad_() for f in outputs.features],
        outputs.trunk_BD.to(dtype).requires_grad_(),
        teacher_logits_BC=outputs.teacher_logits_BC.to(dtype),
        ema_logits_PBC=outputs.ema_logits_PBC.to(dtype),
    )


def largest_tensor(method, outputs, labels, without=()):
    """Return the size of the largest tensor of a forward and backward pass, over that of all logits."""
    outputs = converted(outputs, outputs.logits_PBC.dtype)
    with LargestTensor(without) as largest:
        method(outputs, labels, 0.37)["loss"].backward()
    assert outputs.logits_PBC.grad.isfinite().all()
    return largest.numel / outputs.logits_PBC.numel()


@heads
@pytest.mark.parametrize(
    ("num_peers", "classes"), [(2, 10), (3, 10), (3, 1000), (5, 100), (8, 10), (16, 10), (16, 200)]
)
def test_no_tensor_is_larger_than_three_times_all_logits(name, num_peers, classes):
    num_peers = max(num_peers, 3) if name.startswith("okddip") else num_peers
    method = HEADS[name](num_peers, 16, classes)
    assert largest_tensor(method, *outputs_of(num_peers, 32, classes, 16)) <= 3


@pytest.mark.parametrize("name", ["okddip", "okddip okddip_code", "pcl"])
def test_wide_features_are_not_put_side_by_side(name):
    method = HEADS[name](4, 512, 100)
    parameters = {tuple(p.shape) for p in method.parameters()}  # their gradients cannot be smaller
    parameters |= {shape[::-1] for shape in parameters}
    assert largest_tensor(method, *outputs_of(4, 128, 100, 512), without=parameters) <= 3


@pytest.mark.parametrize("widths", [(3, 4, 5), (20, 30, 40)])
def test_pcl_classifies_all_features_with_one_linear_layer(widths):
    method, features = PCL(3, widths, 7).double(), [torch.randn(6, width).double() for width in widths]
    outputs = PeerOutputs(torch.zeros(3, 6, 7).double(), features)
    expected = sum(
        torch.einsum("bd,cd->bc", feature, weight)
        for feature, weight in zip(features, method.classifier.weight.split(widths, 1))
    )
    close(method.ensemble(outputs), (expected + method.classifier.bias).log_softmax(-1))


def test_what_measures_the_largest_tensor_sees_forward_and_backward():
    z, _, _ = random_peers(num_peers=4, batch=5, classes=7)
    sizes = []
    with LargestTensor() as largest:
        loss = pairwise_by_tables(z, soften(z.detach(), 1.0), kl_from_log_probs).sum()
    sizes.append(largest.numel)
    with LargestTensor() as largest:
        loss.backward()
    sizes.append(largest.numel)
    assert sizes == [4 * 4 * 5 * 7] * 2


@heads
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("classes", [1, 6])
def test_values_and_gradients_are_finite(name, scale, classes):
    outputs, labels = outputs_of(4, 3, classes, 16, scale=scale)
    method = HEADS[name](4, 16, classes)
    for factor in (1.0, 1000.0):  # saturated attention
        given = converted(outputs, torch.float32)
        given.features = [(f * factor).detach().requires_grad_() for f in given.features]
        terms = method(given, labels, 0.37)
        terms["loss"].backward()
        assert all(value.isfinite().all() for value in terms.values())
        leaves = [given.logits_PBC, *given.features, *method.parameters()]
        assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("variant", ["paper", "okddip_code"])
@pytest.mark.parametrize("factor", [10.0, 1000.0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_saturated_attention_equals_the_loop(mask_self, variant, factor, scale):
    z, h, y = random_peers(batch=3, classes=5, scale=scale)
    h = [(f * factor).detach().requires_grad_() for f in h]
    method = OKDDip(4, 16, variant, temperature=2.0, mask_self=mask_self).double()
    terms = method(PeerOutputs(z, h), y, 0.37)
    naive, attention = oracles.okddip(
        z, h, *method.parameters(), y, temperature=2.0, weight=0.37, variant=variant, mask_self=mask_self
    )
    close(terms["loss"], naive)
    close(terms["attention_BAA"], attention)
    ours = torch.autograd.grad(terms["loss"], [z, *h[:3], *method.parameters()])
    theirs = torch.autograd.grad(naive, [z, *h[:3], *method.parameters()])
    for a, b in zip(ours, theirs):
        close(a / factor, b / factor)


@heads
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("classes", [10, 1000])
def test_losses_in_float32_are_exact_where_peers_nearly_agree(name, spread, classes):
    """Within 1e-6 T^2 log C of float64, on the same numbers."""
    method = HEADS[name](4, 16, classes)
    outputs, labels = outputs_of(4, 8, classes, 16, spread=spread)
    single = method(converted(outputs, torch.float32), labels)["distill_P"]
    double = method.double()(converted(outputs, torch.float64), labels)["distill_P"]
    bound = 1e-6 * getattr(method, "temperature", 1.0) ** 2 * math.log(classes)
    assert (single - double).abs().max() <= bound


def pairwise_by_tables(student_PBC, target_PBC, kl):
    """Every divergence in a table of P x P, without the diagonal."""
    kl_PP = kl(student_PBC.unsqueeze(1), target_PBC.unsqueeze(0))
    return (kl_PP * (1 - torch.eye(len(kl_PP), dtype=kl_PP.dtype))).sum(1)


def mixture_by_logsumexp(log_weights_BPQ, log_probs_QBC):
    """The logarithm of a mixture from a tensor of B x P x Q x C."""
    return (log_weights_BPQ.unsqueeze(-1) + log_probs_QBC.transpose(0, 1).unsqueeze(1)).logsumexp(2).transpose(0, 1)


def gradient_error(loss, z_PBC):
    """Return the root mean square of the error of the gradient in float32, and that of the gradient."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = z_PBC.to(dtype, copy=True).requires_grad_()
        grads.append(torch.autograd.grad(loss(leaf), leaf)[0].double())
    return (grads[0] - grads[1]).square().mean().sqrt().item(), grads[1].square().mean().sqrt().item()


def ours_and_the_tables(name, temperature, log_weights):
    def mean_teachers(z):
        return soften(z.detach().roll(1, 1), temperature)

    def kl(student, log_target):
        return kl_from_log_probs(student, log_target, temperature)

    def mixed(z, mix):
        target, log_target = mix(log_weights.to(z.dtype), soften(z, temperature))
        return (target * (log_target - soften(z, temperature))).sum()

    def mix_by_logsumexp(weights, log_probs):
        log_target = mixture_by_logsumexp(weights, log_probs)
        return log_target.exp(), log_target

    return {
        "constant targets": (
            lambda z: pairwise_kl(soften(z, temperature), mean_teachers(z)).sum() * temperature**2,
            lambda z: pairwise_by_tables(z, mean_teachers(z), kl).sum(),
        ),
        "learning targets": (
            lambda z: pairwise_kl(soften(z, temperature), soften(z, temperature)).sum() * temperature**2,
            lambda z: pairwise_by_tables(z, soften(z, temperature), kl).sum(),
        ),
        "mixture": (lambda z: mixed(z, mix_probs), lambda z: mixed(z, mix_by_logsumexp)),
    }[name]


@pytest.mark.parametrize("name", ["constant targets", "learning targets", "mixture"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("scale", "spread"), [(3.0, 1.0), (100.0, 1.0), (3.0, 1e-2)])
def test_gradients_in_float32_are_as_exact_as_from_tables(name, temperature, scale, spread):
    z = (torch.randn(1, 64, 100) + spread * torch.randn(6, 64, 100)) * scale
    log_weights = torch.randn(64, 6, 6).log_softmax(-1)
    ours, tables = ours_and_the_tables(name, temperature, log_weights)
    (error, size), (table_error, table_size) = gradient_error(ours, z), gradient_error(tables, z)
    assert size == pytest.approx(table_size, rel=1e-9)
    assert error <= 1.25 * table_error + 1e-9 * size


@pytest.mark.parametrize("num_peers", [2, 3, 16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_pairwise_divergences_equal_the_tables_in_float64(num_peers, scale, eps):
    z, _, _ = random_peers(num_peers, batch=4, classes=9, scale=scale)
    target = (z.detach() + torch.randn_like(z)).requires_grad_()
    ours = pairwise_kl(soften(z, 2.0), soften(target, 2.0), eps) * 4
    table = pairwise_by_tables(z, soften(target, 2.0), lambda s, t: kl_from_log_probs(s, t, 2.0, eps))
    close(ours, table)
    ramp = torch.linspace(1, 2, num_peers, dtype=torch.float64)  # peers of unequal weight
    for a, b in zip(
        torch.autograd.grad((ours * ramp).sum(), (z, target)), torch.autograd.grad((table * ramp).sum(), (z, target))
    ):
        close(a, b)


@pytest.mark.parametrize("num_peers", [2, 4, 16])
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_divergences_of_nearly_equal_peers_keep_the_digits_of_the_tables(num_peers, spread):
    """What is left is the rounding of the log-probabilities; entropies minus cross-entropies lose ten times as much."""
    z = torch.randn(1, 32, 100) * 3 + spread * torch.randn(num_peers, 32, 100)
    log_probs = soften(z, 1.0)
    exact = pairwise_kl(soften(z.double(), 1.0), soften(z.double(), 1.0))
    error = (pairwise_kl(log_probs, log_probs) - exact).abs().max()
    table_error = (pairwise_by_tables(log_probs, log_probs, kl_of_log_probs) - exact).abs().max()
    assert error <= 1.2 * table_error


def test_a_confident_peers_own_target_hides_no_digits_of_the_others():
    target = torch.tensor([[[2.2, 0.1, 0.0]], [[-6.0, 0.0, 1.0]], [[-7.0, 0.3, 1.0]]]).log_softmax(-1)
    student = torch.tensor([[[-1e5, 0.0, 1.0]], [[-6.0, 0.0, 1.0]], [[-7.0, 0.3, 1.0]]]).log_softmax(-1)
    close(pairwise_kl(student, target).double(), pairwise_kl(student.double(), target.double()), 1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_authors_pairwise_gradient_is_that_of_finite_differences(scale):
    z, _, _ = random_peers(num_peers=3, batch=2, classes=4, scale=scale)
    target = z.detach().roll(1, 1).softmax(-1)
    assert torch.autograd.gradcheck(lambda z: authors_pairwise_kl(z.softmax(-1), target), (z,), rtol=1e-4, atol=1e-6)


def test_mixtures_equal_logsumexp_and_stay_finite_where_it_is_excluded():
    z, _, _ = random_peers(num_peers=5, batch=4, classes=9, scale=30.0)
    log_probs = z.log_softmax(-1)
    weights = torch.randn(4, 3, 5, dtype=torch.float64).log_softmax(-1)
    probs, logs = mix_probs(weights, log_probs)
    close(logs, mixture_by_logsumexp(weights, log_probs))
    close(probs, logs.exp())
    excluded = weights.index_fill(2, torch.tensor([0]), -math.inf).log_softmax(-1)
    log_probs = torch.tensor([[0.0, -2000.0], [-2000.0, 0.0], [-2000.0, 0.0]], dtype=torch.float64).unsqueeze(1)
    probs, logs = mix_probs(excluded[:1, :, :3].log_softmax(-1), log_probs)
    assert logs.isfinite().all()
    close(probs, torch.tensor([0.0, 1.0]).double().expand(3, 1, 2))


def test_distances_of_peers_make_no_tensor_of_all_pairs():
    probs = torch.randn(16, 8, 10).softmax(-1)
    with LargestTensor() as largest:
        peer_distance(probs)
    assert largest.numel <= probs.numel()
