"""Branches against networks that share their first layers, put together by hand, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.models import resolve
from codistill.peers.shared_trunk import BranchEntry, SharedModule
from codistill.utils.errors import InputError
from helpers.peer_networks import (
    CLASSES,
    TREE,
    TREE_OWNERS,
    TinyViT,
    assert_same_state,
    branches,
    fork_owners,
    gradients,
    loss_of,
    named,
    owners_of,
    plain_branches,
    plain_network,
    slow_fork,
    slow_tree,
    some_images,
)

# ----------------------------------------------------------------------------------------------------------------------
# Branches: equal to networks that share their first layers


@pytest.mark.parametrize("count", [1, 2, 4])
def test_branches_equal_a_trunk_run_once_with_hand_made_branches(count):
    peers, plains = branches(count), plain_branches(fork_owners(count))
    images = some_images()
    for step in range(2):  # a second step: nothing is kept from the first
        outputs = peers(images + step)
        logits, features, trunk = slow_fork(plains, images + step)
        torch.testing.assert_close(outputs.logits_PBC, torch.stack(logits), rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(outputs.features, features):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(outputs.trunk_BD, trunk, rtol=1e-10, atol=1e-10)
        loss_of(outputs.logits_PBC, outputs.features).backward()
        loss_of(logits, features).backward()
        assert_same_state(peers, plains, 1e-10)
    assert int(named(peers, count - 1)["bn1.num_batches_tracked"]) == 2
    assert peers.trunk_dim == 32


def test_a_tree_equals_hand_made_limbs_and_branches():
    peers, plains = branches(4, **TREE), plain_branches(TREE_OWNERS)
    images = some_images()
    outputs = peers(images)
    logits, features, trunk = slow_tree(plains, images)
    torch.testing.assert_close(outputs.logits_PBC, torch.stack(logits), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs.trunk_BD, trunk, rtol=1e-10, atol=1e-10)
    loss_of(outputs.logits_PBC, outputs.features).backward()
    loss_of(logits, features).backward()
    assert_same_state(peers, plains, 1e-10)
    assert int(named(peers, 3)["layer2.0.bn1.num_batches_tracked"]) == 1
    assert peers.trunk_dim == 16


def test_gradients_reach_the_images_through_every_branch():
    peers, plains = branches(3), plain_branches(fork_owners(3))
    mine, theirs = some_images().requires_grad_(), some_images().requires_grad_()
    outputs = peers(mine)
    logits, features, _ = slow_fork(plains, theirs)
    loss_of(outputs.logits_PBC, outputs.features).backward()
    loss_of(logits, features).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_pooled_trunk():
    peers, plains = branches(3), plain_branches(fork_owners(3))
    images = some_images()
    (peers(images).trunk_BD ** 2).sum().backward()
    (slow_fork(plains, images)[2] ** 2).sum().backward()
    expected = plains[0].conv1.weight.grad
    assert expected.abs().max() > 0
    torch.testing.assert_close(named(peers, 0)["conv1.weight"].grad, expected, rtol=1e-10, atol=1e-10)


LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3")
SHARING = {
    "the papers' place": (4, {}, ["0000", "0000", "0000", "0000", "0123"]),
    "layer1": (3, {"branch_at": "layer1"}, ["000", "000", "012", "012", "012"]),
    "layer2": (2, {"branch_at": ["layer2"]}, ["00", "00", "00", "01", "01"]),
    "a tree": (4, TREE, ["0000", "0000", "0000", "0022", "0123"]),
    "two limbs of three": (6, TREE | {"fan_out": (2, 3)}, ["000000", "000000", "000000", "000333", "012345"]),
    "three limbs of two": (6, TREE | {"fan_out": (3, 2)}, ["000000", "000000", "000000", "002244", "012345"]),
    "three forks": (
        8,
        {"branch_at": ("layer1", "layer2", "layer3"), "fan_out": (2, 2, 2)},
        ["0" * 8, "0" * 8, "00004444", "00224466", "01234567"],
    ),
}


@pytest.mark.parametrize("case", SHARING)
def test_members_share_exactly_what_comes_before_their_fork(case):
    count, options, expected = SHARING[case]
    peers = branches(count, **options)
    for layer, owners in zip(LAYERS, expected):
        assert owners_of(peers, layer) == [int(o) for o in owners], layer
    assert len({id(member.head.weight) for member in peers.members}) == count


INNER_FORKS = {
    # Forks inside resnet20's stages of three blocks: expected owners of some blocks.
    ("layer2.1", "layer3"): {"layer2.0": "0000", "layer2.1": "0022", "layer2.2": "0022", "layer3.0": "0123"},
    ("layer2", "layer2.1"): {"layer1.2": "0000", "layer2.0": "0022", "layer2.1": "0123", "layer3.0": "0123"},
    ("layer2.1", "layer2.2"): {"layer2.0": "0000", "layer2.1": "0022", "layer2.2": "0123", "layer3.0": "0123"},
    ("layer2.1", "layer3.1"): {"layer2.0": "0000", "layer2.2": "0022", "layer3.0": "0022", "layer3.1": "0123"},
}


@pytest.mark.parametrize("forks", INNER_FORKS)
def test_a_tree_may_fork_inside_its_stages(forks):
    peers = branches(4, spec="resnet20", branch_at=forks, fan_out=(2, 2))
    for layer, owners in INNER_FORKS[forks].items():
        assert owners_of(peers, layer) == [int(o) for o in owners], layer
    # In evaluation mode nothing couples the members: a shared layer's gradient is the sum over plain networks.
    plains = [peers.export_member(p).eval() for p in range(4)]
    images = some_images()
    peers.eval()
    outputs = peers(images)
    torch.testing.assert_close(outputs.logits_PBC, torch.stack([p(images) for p in plains]), rtol=1e-10, atol=1e-10)
    for factor in (1, 2):
        peers.set_rescale(factor == 2)
        mine = gradients(peers, images)
        for plain in plains:
            plain.zero_grad()
        loss_of([p(images) for p in plains], [p.forward_features(images) for p in plains]).backward()
        for layer, owners in INNER_FORKS[forks].items():
            sharing = owners.count(owners[0])
            for name in (n for n in mine[0] if n.startswith(layer)):
                expected = sum(dict(plains[p].named_parameters())[name].grad for p in range(sharing))
                expected = expected / (sharing if factor == 2 else 1)
                torch.testing.assert_close(mine[0][name], expected, rtol=1e-9, atol=1e-10, msg=f"{name} x1/{factor}")


def test_a_fork_inside_a_block_shares_but_cannot_rescale():
    peers = branches(3, spec="resnet20", branch_at="layer2.1.conv1")
    for layer in ("layer1.2", "layer2.0"):
        assert owners_of(peers, layer) == [0, 0, 0], layer
    for layer in ("layer2.1.conv1", "layer2.1.bn2", "layer2.2", "layer3.0"):
        assert owners_of(peers, layer) == [0, 1, 2], layer
    plains = [peers.export_member(p).eval() for p in range(3)]
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(peers.eval()(some_images()).logits_PBC, logits, rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="would not be rescaled"):
        peers.set_rescale(True)
    with pytest.raises(InputError, match="would not be rescaled"):
        branches(3, spec="resnet20", branch_at="layer2.1.conv1", rescale=True)


def test_the_trunk_follows_the_order_of_execution():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
            self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.last(self.middle(self.first(x))).mean((2, 3)))

    peers = branches(4, spec=Backwards, branch_at=("middle", "last"), fan_out=(2, 2))
    assert peers.trunk_dim == 4
    images = some_images()
    expected = named(peers, 0)["first.weight"], named(peers, 0)["first.bias"]
    trunk = F.conv2d(images, *expected, padding=1).mean((2, 3))
    torch.testing.assert_close(peers(images).trunk_BD, trunk, rtol=1e-10, atol=1e-10)


def test_with_own_views_the_trunk_runs_once_a_view():
    peers, plains = branches(3), plain_branches(fork_owners(3))
    views = some_images(views=3)
    outputs = peers(views)
    logits, features = [], []
    for plain, view in zip(plains, views):
        (z,), (f,), _ = slow_fork([plain], view)
        logits.append(z)
        features.append(f)
    torch.testing.assert_close(outputs.logits_PBC, torch.stack(logits), rtol=1e-10, atol=1e-10)
    assert outputs.trunk_BD is None
    loss_of(outputs.logits_PBC, outputs.features).backward()
    loss_of(logits, features).backward()
    assert_same_state(peers, plains, 1e-10)
    assert int(named(peers, 0)["bn1.num_batches_tracked"]) == 3
    assert int(named(peers, 0)["layer3.0.bn1.num_batches_tracked"]) == 1


def test_with_one_view_the_trunk_runs_once():
    runs = []
    peers = branches(4, **TREE)
    for p, layer in ((0, "conv1"), (0, "layer2.0.conv1"), (2, "layer2.0.conv1"), (3, "layer3.0.conv1")):
        module = peers.members[p].body.get_submodule(layer)
        module = module.inner if isinstance(module, SharedModule) else module
        module.register_forward_hook(lambda *_, p=p, layer=layer: runs.append((p, layer)))
    peers(some_images())
    assert sorted(runs) == [(0, "conv1"), (0, "layer2.0.conv1"), (2, "layer2.0.conv1"), (3, "layer3.0.conv1")]
    runs.clear()
    peers(some_images(views=4))
    assert len([r for r in runs if r == (0, "conv1")]) == 4
    assert len([r for r in runs if r == (2, "layer2.0.conv1")]) == 2


def test_nothing_is_kept_between_two_batches():
    peers = branches(3).eval()
    first, second = some_images(4), some_images(7) * 2
    expected = copy.deepcopy(peers)(second)
    peers(first)
    outputs = peers(second)
    assert torch.equal(outputs.logits_PBC, expected.logits_PBC)
    assert torch.equal(outputs.trunk_BD, expected.trunk_BD)
    for module in peers.modules():
        if isinstance(module, SharedModule):
            assert module._outputs == []
        if isinstance(module, BranchEntry):
            assert module.last_input is None


@pytest.mark.parametrize("options", [{}, TREE])
def test_modules_of_members_keep_their_mode_while_building(options):
    def with_fixed_statistics(num_classes=CLASSES):
        network = resolve("resnet8")(num_classes)
        for module in network.modules():
            module.training = not isinstance(module, nn.BatchNorm2d)
        return network

    peers = branches(4, spec=with_fixed_statistics, **{"branch_at": "layer3"} | options)
    for member in peers.members:
        for module in member.to_plain_module().modules():
            assert module.training == (not isinstance(module, nn.BatchNorm2d))


# ----------------------------------------------------------------------------------------------------------------------
# Rescaling


def test_rescaling_divides_the_trunk_gradient_by_the_branches():
    peers, images = branches(3), some_images()
    peers.eval()
    before, plain = peers(images), gradients(peers, images)
    peers.set_rescale(True)
    after, rescaled = peers(images), gradients(peers, images)
    assert torch.equal(after.logits_PBC, before.logits_PBC)
    assert torch.equal(after.trunk_BD, before.trunk_BD)
    for p in range(3):
        for name, gradient in plain[p].items():
            factor = 1.0 if name.startswith(("layer3", "fc")) else 1 / 3
            torch.testing.assert_close(rescaled[p][name], gradient * factor, rtol=1e-10, atol=1e-13)
    assert plain[0]["conv1.weight"].abs().max() > 1e-3
    peers.set_rescale(False)
    assert torch.equal(gradients(peers, images)[0]["conv1.weight"], plain[0]["conv1.weight"])


@pytest.mark.parametrize("fan_out", [(2, 2), (3, 2), (2, 3)])
def test_rescaling_a_tree_divides_by_each_forks_fan_out(fan_out):
    images = some_images()
    options = {"branch_at": ("layer2", "layer3"), "fan_out": fan_out}
    count = math.prod(fan_out)
    plain = gradients(branches(count, **options), images)
    rescaled = gradients(branches(count, rescale=True, **options), images)
    for p in range(count):
        for name, gradient in plain[p].items():
            factor = 1 / count
            if name.startswith("layer2"):
                factor = 1 / fan_out[1]
            if name.startswith(("layer3", "fc")):
                factor = 1.0
            torch.testing.assert_close(rescaled[p][name], gradient * factor, rtol=1e-10, atol=1e-13)


def test_rescaling_refuses_a_skip_connection_around_the_fork():
    peers = branches(3, spec=TinyViT, branch_at="blocks.1")  # its forward is x + block(x)
    with pytest.raises(InputError, match="would not be rescaled"):
        peers.set_rescale(True)
    peers.set_rescale(False)

    class Inside(TinyViT):
        def __init__(self):
            super().__init__()
            for index, block in enumerate(self.blocks):
                self.blocks[index] = Residual(block)

        def forward(self, x):
            x = self.tokens(x)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    class Residual(nn.Module):
        def __init__(self, inner_block):
            super().__init__()
            self.block = inner_block

        def forward(self, x):
            return x + self.block(x)

    images = some_images()
    plain = gradients(branches(3, spec=Inside, branch_at="blocks.1"), images)
    rescaled = gradients(branches(3, spec=Inside, branch_at="blocks.1", rescale=True), images)
    for name in ("token", "position", "patch.weight", "blocks.0.block.1.weight"):
        torch.testing.assert_close(rescaled[0][name], plain[0][name] / 3, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(rescaled[0]["norm.weight"], plain[0]["norm.weight"], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", [{}, TREE])
def test_equal_rescaled_branches_train_like_one_network(options):
    peers, plain = branches(4, rescale=True, **options), plain_network(0)
    for p in range(4):
        with torch.no_grad():
            for name, tensor in plain.named_parameters():
                named(peers, p)[name].copy_(tensor)
    images, targets = some_images(), torch.arange(6) % CLASSES
    sum(F.cross_entropy(z, targets) for z in peers(images).logits_PBC).backward()
    F.cross_entropy(plain(images), targets).backward()
    for p in range(4):
        for name, tensor in plain.named_parameters():
            torch.testing.assert_close(named(peers, p)[name].grad, tensor.grad, rtol=1e-9, atol=1e-11)
