"""OKDDip against the authors' numbers and against loops written from the paper."""

import itertools

import pytest
import torch

from codistill.config.methods import OKDDipConfig
from codistill.methods import OKDDip, PeerInfo
from codistill.peers.base import PeerOutputs
from codistill.utils.errors import InputError
from helpers import oracles
from helpers.common import close, golden, random_peers


def run(method, z, h, y, weight=0.37):
    return method(PeerOutputs(z, h), y, weight=weight)


def test_the_authors_code_is_met_in_value_and_gradient():
    g = golden()
    z = g["logits"].clone().requires_grad_()
    h = [f.clone().requires_grad_() for f in g["features"]]
    method = OKDDip(4, 64, variant="okddip_code").double()
    method.query.weight.data.copy_(g["w_query"])
    method.key.weight.data.copy_(g["w_key"])
    terms = run(method, z, h, g["labels"], float(g["okddip_weight"]))
    terms["loss"].backward()
    close(terms["loss"], g["okddip_loss"], 1e-12)
    close(terms["ce_P"][:3].sum(), g["okddip_ce_peers"], 1e-12)
    close(terms["ce_P"][3], g["okddip_ce_leader"], 1e-12)
    close(terms["distill_P"][:3].sum(), g["okddip_kl_peers"], 1e-12)
    close(terms["distill_P"][3], g["okddip_kl_leader"], 1e-12)
    close(terms["attention_BAA"], g["okddip_attention"], 1e-12)
    close(z.grad, g["okddip_grad_logits"], 1e-12)
    close(method.query.weight.grad, g["okddip_grad_w_query"], 1e-12)
    close(method.key.weight.grad, g["okddip_grad_w_key"], 1e-12)
    close(torch.stack([f.grad for f in h[:3]]), g["okddip_grad_features"], 1e-12)


CASES = list(
    itertools.product(
        ("paper", "okddip_code"), ("none", "peers", "all"), (False, True), ("none", "mean", "symmetric", "no_leader")
    )
)


@pytest.mark.parametrize(("variant", "detach", "mask_self", "ablation"), CASES)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
def test_every_option_equals_the_loop_in_value_and_gradient(variant, detach, mask_self, ablation, scale):
    z, h, y = random_peers(batch=3, classes=5, scale=scale)
    options = {"variant": variant, "detach": detach, "mask_self": mask_self, "ablation": ablation}
    torch.manual_seed(1)
    method = OKDDip(4, 16, temperature=2.0, **options).double()
    weights = list(method.parameters())
    w_query, w_key = weights if weights else (None, None)
    terms = run(method, z, h, y)
    naive, attention = oracles.okddip(z, h, w_query, w_key, y, temperature=2.0, weight=0.37, **options)
    close(terms["loss"], naive)
    close(terms["attention_BAA"], attention)
    inputs = [z, *h, *weights]
    ours = torch.autograd.grad(terms["loss"], inputs, allow_unused=True)
    theirs = torch.autograd.grad(naive, inputs, allow_unused=True)
    for a, b in zip(ours, theirs):
        close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)


def test_projections_learn_unless_everything_is_detached():
    z, h, y = random_peers()
    for detach, learns in (("none", True), ("peers", True), ("all", False)):
        method = OKDDip(4, 16, detach=detach).double()
        run(method, z, h, y)["loss"].backward()
        assert (method.query.weight.grad is not None and method.query.weight.grad.abs().max() > 1e-8) == learns


def test_the_leader_leaves_the_peers_alone_once_detached():
    z, h, y = random_peers()
    for detach in ("none", "peers"):
        method = OKDDip(4, 16, detach=detach).double()
        leader = run(method, z, h, y, weight=1.0)["loss_P"][3]
        (grad,) = torch.autograd.grad(leader, z, retain_graph=True)
        assert (grad[:3].abs().max() > 1e-6) == (detach == "none")
        assert grad[3].abs().max() > 1e-6


def test_mask_self_removes_the_optimum_of_self_attention():
    z, h, y = random_peers()
    h = [f * 100 for f in h]  # sharp attention: every peer attends to itself under the symmetric form
    free = run(OKDDip(4, 16, ablation="symmetric").double(), z, h, y)
    masked = run(OKDDip(4, 16, ablation="symmetric", mask_self=True).double(), z, h, y)
    assert free["distill_P"][:3].max() < 1e-6
    assert masked["distill_P"][:3].min() > 1e-3
    assert torch.equal(masked["attention_BAA"].diagonal(dim1=1, dim2=2), torch.zeros(5, 3, dtype=torch.float64))


def test_random_attention_is_drawn_anew_and_sums_to_one():
    z, h, y = random_peers()
    method = OKDDip(4, 16, ablation="random").double()
    first, second = (run(method, z, h, y)["attention_BAA"] for _ in range(2))
    close(first.sum(-1), torch.ones(5, 3, dtype=torch.float64))
    assert not torch.equal(first, second)
    assert not list(method.parameters())


def test_entropy_takes_the_place_of_the_first_level():
    z, h, y = random_peers()
    method = OKDDip(4, 16, ablation="entropy", entropy_weight=0.1).double()
    terms = run(method, z, h, y)
    rows = [[oracles.log_softmax(z[a][b]) for b in range(5)] for a in range(3)]
    mean_entropy = -sum(torch.exp(v) * v for peer in rows for row in peer for v in row) / 15
    target = [
        [
            float(v)
            for v in oracles.mixed_log_probs([-torch.tensor(3.0).double().log()] * 3, [z[a][b] for a in range(3)], 3.0)
        ]
        for b in range(5)
    ]
    leader = (
        sum(oracles.kl_row([torch.tensor(v, dtype=torch.float64) for v in target[b]], z[3][b], 3.0) for b in range(5))
        / 5
    )
    naive = sum(oracles.ce(z[p], y) for p in range(4)) - 0.1 * mean_entropy + 0.37 * leader
    close(terms["loss"], naive)
    assert terms["distill_P"][:3].abs().max() == 0


def test_order_of_auxiliary_peers_does_not_matter():
    z, h, y = random_peers()
    torch.manual_seed(0)
    method = OKDDip(4, 16).double()
    order = [2, 0, 1, 3]
    close(run(method, z, h, y)["loss"], run(method, z[order], [h[i] for i in order], y)["loss"], 1e-12)


def test_who_is_deployed_and_who_forms_the_group():
    assert (OKDDip(4, 16).deployed, OKDDip(4, 16).group) == (3, (0, 1, 2))
    drawn = {OKDDip(4, 16, ablation="no_leader", seed=seed).deployed for seed in range(8)}
    assert drawn == {0, 1, 2, 3}
    assert OKDDip(4, 16, ablation="no_leader").group == (0, 1, 2, 3)


def test_attention_refuses_unequal_feature_widths():
    info = PeerInfo(4, 10, (16, 32, 16, 16))
    with pytest.raises(InputError, match="widths 16, 32, 16"):
        OKDDip.build(OKDDipConfig(), info)
    assert OKDDip.build(OKDDipConfig(ablation="mean"), info).num_peers == 4
    assert OKDDip.build(OKDDipConfig(), PeerInfo(4, 10, (16, 16, 16, 64))).query.in_features == 16
    with pytest.raises(InputError, match="D = 4"):
        OKDDip(3, 4)
