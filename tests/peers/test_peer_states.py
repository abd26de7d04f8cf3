"""Exported members, states, copies, dtypes and layouts of peers."""

import copy

import pytest
import torch

from codistill.peers.branches import BranchPeers
from codistill.peers.shared_trunk import BranchEntry, SharedModule
from codistill.peers.twins import TwinPeers
from helpers.peer_networks import (
    CLASSES,
    SIZE,
    TREE,
    TinyViT,
    branches,
    count_parameters,
    gradients,
    loss_of,
    networks,
    plain_network,
    some_images,
)


def assert_plain(network):
    assert not [name for name, module in network.named_modules() if isinstance(module, SharedModule | BranchEntry)]


@pytest.mark.parametrize(("build", "options"), [(networks, {}), (branches, {}), (branches, TREE)])
def test_an_exported_member_is_a_plain_network_that_stands_alone(build, options):
    peers = build(4, **options)
    peers(some_images())  # moves the running statistics
    peers.eval()
    images = some_images() + 0.5
    logits = peers(images).logits_PBC
    state = copy.deepcopy(peers.state_dict())
    for p in range(4):
        student = peers.export_member(p)
        assert_plain(student)
        fresh = plain_network(0)
        fresh.load_state_dict(student.state_dict())  # strict: the names are the plain network's
        torch.testing.assert_close(fresh.eval()(images), logits[p], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(student(images), logits[p], rtol=1e-12, atol=1e-12)
        for tensor in (*student.parameters(), *student.buffers()):
            tensor.data.fill_(1)
    for name, tensor in peers.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_exported_members_of_other_networks_are_plain_too():
    for options in ({"branch_at": "blocks.1"}, {"branch_at": ("blocks.1", "blocks.2"), "fan_out": (2, 2)}):
        peers = branches(4, spec=TinyViT, **options).eval()
        images = some_images()
        logits = peers(images).logits_PBC
        for p in range(4):
            student = peers.export_member(p)
            assert_plain(student)
            assert set(student.state_dict()) == set(TinyViT().state_dict())
            assert student.token.data_ptr() != peers.members[p].body.token.data_ptr()
            torch.testing.assert_close(student(images), logits[p], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("build", "options"), [(networks, {}), (branches, {}), (branches, TREE)])
def test_a_state_goes_round_into_fresh_peers(build, options):
    peers, fresh = build(4, 0, **options), build(4, 9, **options)
    peers(some_images())
    with torch.no_grad():
        for parameter in peers.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    fresh.load_state_dict(peers.state_dict())
    assert torch.equal(fresh.eval()(some_images()).logits_PBC, peers.eval()(some_images()).logits_PBC)
    assert count_parameters(fresh) == count_parameters(peers)


def test_a_deep_copy_shares_nothing_with_the_original():
    peers = branches(4, **TREE)
    twin = copy.deepcopy(peers)
    assert count_parameters(twin) == count_parameters(peers)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in peers.parameters()}
    images = some_images()
    for a, b in zip(gradients(peers, images), gradients(twin, images)):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-14)


def test_sharing_survives_a_change_of_dtype_and_layout():
    peers = BranchPeers(TinyViT, 3, CLASSES, branch_at="blocks.1", image_size=SIZE)
    before = count_parameters(peers)
    peers.to(torch.float64, memory_format=torch.channels_last)
    assert count_parameters(peers) == before
    assert len({id(member.body.token) for member in peers.members}) == 1


def test_train_and_eval_mode_reach_shared_layers():
    peers = branches(2)
    assert all(module.training for module in peers.modules())
    assert not any(module.training for module in peers.eval().modules())
    before = {name: buffer.clone() for name, buffer in peers.named_buffers()}
    peers(some_images())
    for name, buffer in peers.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_building_changes_no_running_statistics():
    for peers in (networks(2), branches(2), branches(4, **TREE)):
        for name, buffer in peers.named_buffers():
            start = 1 if name.endswith("running_var") else 0
            assert (buffer == start).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(("build", "options"), [(networks, {}), (branches, {}), (branches, TREE)])
def test_compiled_peers_equal_eager_ones(build, options):
    eager, compiled = build(4, **options), build(4, **options)
    run = torch.compile(compiled, backend="aot_eager")
    images = some_images()
    for peers, call in ((eager, eager), (compiled, run)):
        outputs = call(images)
        loss_of(outputs.logits_PBC, outputs.features).backward()
        peers.kept = outputs
    torch.testing.assert_close(compiled.kept.logits_PBC, eager.kept.logits_PBC, rtol=1e-10, atol=1e-10)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-10, msg=name)
    for (name, a), b in zip(eager.named_buffers(), compiled.buffers()):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(("build", "options"), [(networks, {}), (branches, {}), (branches, TREE)])
def test_autocast_leaves_features_logits_and_heads_in_float32(build, options):
    exact, peers = build(4, **options).float().eval(), build(4, **options).float().eval()
    peers.autocast = torch.bfloat16
    images = some_images().float()
    before, outputs = exact(images), peers(images)
    assert outputs.logits_PBC.dtype == torch.float32
    assert {f.dtype for f in outputs.features} == {torch.float32}
    for p, member in enumerate(peers.members):
        logits = outputs.features[p] @ member.head.weight.T + member.head.bias
        torch.testing.assert_close(outputs.logits_PBC[p], logits, rtol=1e-5, atol=1e-5)  # bfloat16 would be 1e-2
    if build is branches:
        assert outputs.trunk_BD.dtype == torch.float32
    assert not torch.equal(outputs.logits_PBC, before.logits_PBC)  # autocast was on
    torch.testing.assert_close(outputs.logits_PBC, before.logits_PBC, rtol=0.2, atol=0.2)
    assert {p.dtype for p in peers.parameters()} == {torch.float32}


def twins(num_peers, spec, **options):
    return TwinPeers(spec, num_peers, CLASSES, image_size=SIZE)


@pytest.mark.parametrize(("build", "options"), [(networks, {}), (branches, {"branch_at": "blocks.1"}), (twins, {})])
def test_the_autocast_of_the_callers_loop_reaches_the_bodies(build, options):
    peers = build(2, spec=TinyViT, **options).float()
    seen = []
    for block in peers.members[0].body.blocks:
        block.register_forward_hook(lambda _m, _x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = peers(some_images().float())
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert {outputs.logits_PBC.dtype, *(f.dtype for f in outputs.features)} == {torch.float32}
    seen.clear()
    peers(some_images().float())
    assert set(seen) == {torch.float32}
