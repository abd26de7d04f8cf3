"""Layer-wise mutual contrastive learning: its parts, its aggregator, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

from codistill.config import LMCLConfig
from codistill.distributed.mesh import Mesh
from codistill.methods import LMCL
from codistill.methods.contrib.match_learning import match_gradients
from codistill.methods.contrib.mcl import PARTS
from codistill.peers import PeerOutputs
from codistill.training.build import build_run, check_inner_steps
from codistill.training.loop import train
from codistill.training.peer_training import PeerTraining
from codistill.training.run import zero_sums
from codistill.training.step import forward_all, train_step
from codistill.training.summary import measure_cost
from codistill.utils import InputError
from helpers import oracles
from helpers.common import GOLDEN, close, random_peers
from helpers.host_reads import CountHostReads
from helpers.runs import StopAt, tiny


def test_the_authors_numbers_of_a_pair():
    with np.load(GOLDEN.parent / "next.npz") as archive:
        g = {name: torch.tensor(archive[name]) for name in archive.files if "mcl_" in name}
    v = torch.nn.functional.normalize(g["mcl_embeddings"][:2], dim=-1)
    method = LMCL(2, (16, 16), [(16,), (16,)], 5, exits=1)
    weights = g["lmcl_weight"] * (1 - torch.eye(2, dtype=torch.float64)).unsqueeze(-1)
    parts = dict(zip(PARTS, method.contrast_embeddings(v, g["mcl_labels"], weights).sum(0)))
    for name in ("vcl", "soft_vcl", "icl"):
        close(parts[name], 2 * g[f"lmcl_{name}"])  # both orders of the pair


def two_layers(module):
    return [p for layer in (module[0], module[2]) for p in (layer.weight, layer.bias)]


def random_exits(num_peers, exits, batch=5, seed=8):
    rng = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(batch, 4 + e, generator=rng, dtype=torch.float64).requires_grad_() for e in range(exits)]
        for _ in range(num_peers)
    ]


def oracle_match(method, features, maps=None):
    """The oracle's matches of the method's maps, or of those given; one half for a method without."""
    if method.matches is None:
        return lambda *place: 0.5
    maps = iter((maps or method.matches.maps()).values())
    return oracles.l_mcl_match([[(next(maps), next(maps)) for _ in own] for own in features], features)


@pytest.mark.parametrize(("num_peers", "exits", "match"), [(2, 2, "fixed"), (3, 1, "fixed"), (2, 1, "learned")])
@pytest.mark.parametrize("labels", [[3, 1, 3, 1, 1], [0, 1, 2, 3, 3], [0, 1, 2, 3, 4]])
def test_equals_the_loop(num_peers, exits, match, labels):
    """Learned matches are constants of the step."""
    torch.manual_seed(4)
    z, h, _ = random_peers(num_peers, dims=(6, 5, 4))
    maps, y = random_exits(num_peers, exits), torch.tensor(labels)
    options = {"tau": 0.2, "temperature": 2.0, "embedding_dim": 3, "exits": exits, "match": match}
    weights = {"vcl_weight": 0.3, "soft_vcl_weight": 0.9, "icl_weight": 0.4, "soft_icl_weight": 1.1}
    dims = [tuple(4 + e for e in range(exits))] * num_peers
    method = LMCL(num_peers, (6, 5, 4)[:num_peers], dims, z.shape[-1], **options, **weights).double()
    loss = method(PeerOutputs(z, h, exits=maps), y, weight=0.8)["loss"]
    heads = [two_layers(head) for head in method.embeddings]
    naive = oracles.l_mcl(
        z, h, maps, y,
        heads=[heads[p * (exits + 1) : (p + 1) * (exits + 1)] for p in range(num_peers)],
        classifiers=[[(c.weight, c.bias) for c in own] for own in method.classifiers],
        gates=[two_layers(gate) for gate in method.gates],
        match=oracle_match(method, [[f.detach() for f in (*own, h[p])] for p, own in enumerate(maps)]),
        tau=0.2, temperature=2.0, weights=weights.values(), weight=0.8,
    )  # fmt: skip
    close(loss, naive)
    inputs = [z, *h, *(m for own in maps for m in own), *method.parameters()]
    ours, theirs = (torch.autograd.grad(v, inputs) for v in (loss, naive))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)


def test_the_contrast_of_inner_steps_equals_the_loop():
    """There the matches have gradients, by maps and by features; targets of soft parts may be of other embeddings."""
    torch.manual_seed(4)
    z, h, _ = random_peers(2, dims=(6, 5))
    own_maps, y = random_exits(2, 1), torch.tensor([3, 1, 3, 1, 1])
    method = LMCL(2, (6, 5), [(4,), (4,)], z.shape[-1], exits=1, match="learned", match_dim=3, embedding_dim=3).double()
    outputs = PeerOutputs(z, h, exits=own_maps)
    given = {name: value.clone().requires_grad_() for name, value in method.matches.maps().items()}
    loss = method.contrastive_loss(outputs, y, given)
    close(loss, method.contrastive_loss(outputs, y, given, method.embed(outputs).detach()))
    features = [[*own, f] for own, f in zip(own_maps, h)]
    v = method.embed(outputs).unflatten(0, (2, 2))
    parts = oracles.l_mcl_parts(v, y, oracle_match(method, features, given), tau=0.1, temperature=3.0)
    naive = sum(w * part for w, part in zip((0.1, 1.0, 0.1, 1.0), parts))
    close(loss, naive)
    inputs = [*given.values(), *h, *(f for own in own_maps for f in own), *method.embeddings.parameters()]
    for a, b in zip(*(torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, naive)), strict=True):
        close(a, b)


def test_the_parts_belong_to_the_networks_whose_rows_they_are():
    z, h, _ = random_peers(2, dims=(6, 5))
    maps, y = random_exits(2, 1), torch.tensor([3, 1, 3, 1, 1])
    terms = LMCL(2, (6, 5), [(4,), (4,)], z.shape[-1], exits=1).double()(PeerOutputs(z, h, exits=maps), y)
    distill = sum(w * terms[f"{name}_BP"][0] for w, name in zip((0.1, 1.0, 0.1, 1.0), PARTS))
    assert (terms["distill_P"] > distill).all()  # the rest is what the aggregated targets teach
    close(terms["gate_BPS"].sum(-1), torch.ones(5, 2, dtype=torch.float64))


def test_what_it_refuses():
    with pytest.raises(InputError, match="--mixup makes labels soft, and l_mcl reads one hard label each"):
        tiny(method=LMCLConfig(), mixup=0.2).resolved()
    with pytest.raises(InputError, match="l_mcl learns at 2 exits of each network, and a network has 1"):
        LMCL(2, (8, 8), [(8,), (8,)], 10)
    z, h, _ = random_peers(2, dims=(6, 5))
    soft = torch.full((5, z.shape[-1]), 1 / z.shape[-1], dtype=torch.float64)
    method = LMCL(2, (6, 5), [(4,), (4,)], z.shape[-1], exits=1).double()
    with pytest.raises(InputError, match="give one hard label per image"):
        method(PeerOutputs(z, h, exits=random_exits(2, 1)), soft)


def test_only_the_plain_network_is_deployed():
    t = build_run(tiny(method=LMCLConfig(), peers=2).resolved())
    student = t.method.deploy(t.peers)
    parts = {key.partition(".")[0] for key in student.state_dict()}
    assert parts == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}
    assert any(t.peers.exit_dims)


def learning_run():
    method = LMCLConfig(exits=1, match="learned", match_dim=5, match_interval=2, embedding_dim=4)
    options = {"method": method, "peers": 2, "dtype": "float64", "model": "tiny_network:Smooth", "lr": 0.05}
    t = build_run(tiny(**options).resolved())
    for module in (*t.method.embeddings, *t.method.gates):
        module[1] = torch.nn.Tanh()  # finite differences need a loss without kinks
    t.progress.sums = zero_sums(t)
    t.peers.train()
    t.method.train()
    return t


def try_steps(t, views, targets, matches):
    """The cross-entropy after two steps on the contrast and one on cross-entropy, with torch's SGD on copies."""
    peers, method = copy.deepcopy((t.peers, t.method))
    for name, value in matches.items():
        method.matches.get_buffer(name).copy_(value)
    parameters = [*peers.parameters(), *method.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=False)
    for p in parameters:
        p.grad = torch.zeros_like(p)  # what a loss leaves alone decays
    for contrast in (True, True, False):
        outputs = peers(views)
        sgd.zero_grad(set_to_none=False)
        if contrast:
            method.contrastive_loss(outputs, targets, method.matches.maps()).backward()
        else:
            method.heads_cross_entropy(outputs, targets).backward()
        sgd.step()
    return method.heads_cross_entropy(peers(views), targets).item()


def test_matches_learn_from_what_steps_with_them_lead_to():
    """The gradient through the steps is that of finite differences, and does not see the momenta of the run."""
    t = learning_run()
    batches = t.loader.epoch(0)
    train_step(t, *next(batches), 1.0)
    views, targets = next(batches)
    before = copy.deepcopy((t.peers.state_dict(), t.method.state_dict(), t.optimizers[0].state_dict()))
    found = match_gradients(t.method, t.method.matches, t.peers, views, targets, t.optimizers[0])
    after = (t.peers.state_dict(), t.method.state_dict(), t.optimizers[0].state_dict())
    for one, other in zip(before[:2], after[:2]):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert str(before[2]) == str(after[2])
    torch.manual_seed(5)
    maps = t.method.matches.maps()
    direction = {name: torch.randn_like(value) for name, value in maps.items()}
    step = 1e-4
    ends = [
        try_steps(t, views, targets, {name: value + sign * step * direction[name] for name, value in maps.items()})
        for sign in (1, -1)
    ]
    along = sum((found[name] * direction[name]).sum() for name in maps).item()
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-10)
    assert abs(along) > 1e-8


def test_maps_step_by_sgd_with_nesterov_after_the_step_on_every_second_batch():
    t = learning_run()
    matches = t.method.matches
    twin = [value.clone().requires_grad_() for value in matches.maps().values()]
    sgd = torch.optim.SGD(twin, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batches = list(t.loader.epoch(0))[:3]
    for step, (views, targets) in [*enumerate(batches), *enumerate(batches)]:  # two epochs begin with an update each
        before = copy.deepcopy(matches.state_dict())
        t.progress.step = step
        train_step(t, views, targets, 1.0)
        after = copy.deepcopy(matches.state_dict())
        if step % 2 == 0:
            matches.load_state_dict(before)
            gradients = match_gradients(t.method, matches, t.peers, views, targets, t.optimizers[0])
            for value, gradient in zip(twin, gradients.values(), strict=True):
                value.grad = gradient
            sgd.step()
            matches.load_state_dict(after)
        for value, ours in zip(twin, matches.maps().values(), strict=True):
            close(ours, value.detach())


def test_inner_steps_do_not_wait_for_the_device():
    t = learning_run()
    with CountHostReads() as mode:
        train_step(t, *next(t.loader.epoch(0)), 1.0)
    assert not mode.reads


def test_learned_matches_are_between_the_values_of_a_cosine():
    t = learning_run()
    views, targets = next(t.loader.epoch(0))
    outputs = t.peers(views)
    w = t.method.match([f.detach() for f in t.method.features_of_heads(outputs)])
    apart = t.method.differ_HH.bool()
    assert not w[~apart].any()
    assert ((w[apart] > 0.26) & (w[apart] < 0.74)).all()  # sigmoid(-1), sigmoid(1)
    close(w, w.transpose(0, 1))
    assert torch.equal(t.method(outputs, targets)["match_BHH"], w.permute(2, 0, 1))


def test_a_run_with_learned_matches_resumes_exactly(tmp_path):
    method = LMCLConfig(exits=1, match="learned", match_dim=5, match_interval=2, embedding_dim=4)
    common = {"method": method, "peers": 2, "checkpoint_every_steps": 1, "epochs": 2}
    whole = train(tiny(out=str(tmp_path / "whole"), **common))
    with pytest.raises(KeyboardInterrupt):
        train(tiny(out=str(tmp_path / "stopped"), **common), StopAt(1, 2))
    again = train(tiny(out=str(tmp_path / "stopped"), resume="auto", **common))
    ours, theirs = again.training.method.state_dict(), whole.training.method.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()


def test_learned_matches_refuse_what_has_no_inner_steps():
    with pytest.raises(InputError, match="learned takes inner steps of SGD, not adamw; give --optimizer sgd"):
        tiny(method=LMCLConfig(match="learned"), optimizer="adamw", lr=1e-3).resolved()
    t = learning_run()
    with pytest.raises(InputError, match="l_mcl tries steps and takes them back"):
        PeerTraining(t.peers, t.method)
    with pytest.raises(InputError, match="--mesh: l_mcl, as it is configured here, tries steps with all networks"):
        check_inner_steps(t.method, Mesh((2, 1), 0, 2, torch.device("cpu")))


def cost_of(t):
    return measure_cost(t, lambda views: forward_all(t, views))


def test_inner_steps_count_as_cost_of_training():
    t = learning_run()
    state = copy.deepcopy(t.method.state_dict())
    learned = cost_of(t)["training_passes"]
    assert all(torch.equal(state[key], value) for key, value in t.method.state_dict().items())
    t.method.inner_interval = 0
    fixed = cost_of(t)["training_passes"]
    t.method.inner_interval = 4
    assert cost_of(t)["training_passes"] - fixed == pytest.approx((learned - fixed) / 2, abs=2e-3)
    assert learned > 1.5 * fixed
