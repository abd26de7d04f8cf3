"""The pure functions against loops, closed forms and finite differences."""

import math

import pytest
import torch

from codistill import losses
from helpers import oracles
from helpers.common import close, golden, random_peers


def test_ramp_takes_the_published_values():
    published = {0: 0.006738, 1: 0.007629, 10: 0.02175, 20: 0.0601, 40: 0.286505, 60: 0.7316, 79: 0.999219, 80: 1.0}
    for epoch, value in published.items():
        assert losses.sigmoid_ramp(epoch, 80) == pytest.approx(value, abs=6e-5 if epoch in (20, 60) else 6e-7)
    assert losses.sigmoid_ramp(300, 80) == 1.0
    assert losses.sigmoid_ramp(0, 0) == 1.0


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cross_entropy_and_kl_equal_the_loops(scale, temperature):
    z, _, y = random_peers(scale=scale)
    ours = losses.cross_entropy(z, y)
    close(ours, torch.stack([oracles.ce(z[p], y) for p in range(4)]))
    close(losses.cross_entropy(z, torch.nn.functional.one_hot(y, 7).double()), ours)
    target = z.detach().roll(1, 0)
    kl = losses.kl_divergence(z, target, temperature)
    naive = torch.stack([oracles.kl(z[p], target[p], temperature) for p in range(4)])
    close(kl, naive)
    (ours_grad,) = torch.autograd.grad(kl.sum(), z)
    (naive_grad,) = torch.autograd.grad(naive.sum(), z)
    close(ours_grad, naive_grad)


def test_kl_gradients_take_their_closed_forms_on_both_sides():
    z, _, _ = random_peers(num_peers=2)
    student, target = z[0].detach().requires_grad_(), z[1].detach().requires_grad_()
    temperature, batch = 3.0, len(student)
    losses.kl_divergence(student, target, temperature).backward()
    p_s, p_t = (student / temperature).softmax(-1), (target / temperature).softmax(-1)
    close(student.grad, temperature * (p_s - p_t) / batch)
    u = p_t.log() - p_s.log()
    close(target.grad, temperature / batch * p_t * (u - (p_t * u).sum(-1, keepdim=True)))


def test_gradients_through_a_uniform_mean_of_all_peers_cancel():
    z, _, _ = random_peers(num_peers=3)
    grads = []
    for detach in (False, True):
        mean = z.mean(0)
        loss = losses.kl_divergence(z, (mean.detach() if detach else mean).expand_as(z), 3.0).sum()
        grads.append(torch.autograd.grad(loss, z)[0])
    close(grads[0], grads[1])
    loo = (z.sum(0) - z) / 2
    loose = torch.autograd.grad(losses.kl_divergence(z, loo, 3.0).sum(), z)[0]
    fixed = torch.autograd.grad(losses.kl_divergence(z, ((z.sum(0) - z) / 2).detach(), 3.0).sum(), z)[0]
    assert (loose - fixed).abs().max() > 1e-3  # a leave-one-out mean does not cancel


def test_scaling_a_gradient_leaves_the_value_alone():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = losses.scale_gradient(x, 0.25)
    assert torch.equal(x, y)
    (grad,) = torch.autograd.grad((y * 2).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 0.5))


def test_diversity_is_the_authors_figure_and_the_papers_distance():
    g = golden()
    probs = g["logits"][:3].softmax(-1)
    close(losses.peer_distance(probs, eps=1e-6).mean(), g["diversity"], 1e-12)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for b in range(16):
        naive = sum(math.dist(probs[i, b].tolist(), probs[j, b].tolist()) for i, j in pairs) / 3
        assert losses.peer_distance(probs)[b].item() == pytest.approx(naive, abs=1e-12)
    assert losses.peer_distance(probs[:1]).sum() == 0


def test_entropy_equals_the_loop():
    z, _, _ = random_peers()
    for p in range(4):
        rows = [oracles.log_softmax(z[p][b]) for b in range(5)]
        naive = -sum(torch.exp(v) * v for row in rows for v in row) / 5
        close(losses.entropy(z)[p], naive)


def test_finite_differences_agree_with_the_gradients():
    z, h, y = random_peers(num_peers=3, batch=2, classes=4, dims=(4, 4, 4))
    h = torch.stack(h).detach().requires_grad_()

    def mixing(z, h):
        return losses.mix_log_probs(losses.attention_log_weights(h, h, mask_self=True), z, 2.0)

    assert torch.autograd.gradcheck(mixing, (z, h))
    assert torch.autograd.gradcheck(lambda s, t: losses.kl_divergence(s, t, 3.0), (z, z.detach().roll(1, 0)))
    assert torch.autograd.gradcheck(lambda s: losses.cross_entropy(s, y), (z,))
    assert torch.autograd.gradcheck(
        lambda s: losses.kl_from_log_probs(s, losses.soften(s, 3.0).roll(1, 0), 3.0, 1e-7), (z,)
    )


@pytest.mark.parametrize(("students", "detach"), [(4, False), (1, False), (4, True)])
def test_the_written_gradients_of_mixtures_are_the_derivatives(students, detach):
    torch.manual_seed(3)
    z_NBC = (torch.randn(4, 5, 6, dtype=torch.float64) * 2).requires_grad_()
    log_weights = torch.randn(5, students, 3, dtype=torch.float64).log_softmax(-1).requires_grad_()
    row = torch.rand(students, dtype=torch.float64)

    def by_definition(z, log_w):
        source = z[:3].detach() if detach else z[:3]
        mixtures = torch.einsum("bpq,qbc->pbc", log_w.exp(), (source / 1.7).softmax(-1))
        log_q = (z[-students:] / 1.7).log_softmax(-1)
        return (1.7**2 * (mixtures * (mixtures.log() - log_q)).sum(-1).mean(-1) * row).sum()

    loss, log_mixtures = losses.mixture_kl(z_NBC, log_weights, 1.7, detach_sources=detach)
    expected = torch.autograd.grad(by_definition(z_NBC, log_weights), (z_NBC, log_weights))
    for got, want in zip(torch.autograd.grad((loss * row).sum(), (z_NBC, log_weights)), expected):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not log_mixtures.requires_grad
