"""Peers against plain networks that are put together by hand, layer by layer, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.config import InputError
from codistill.models import resolve
from codistill.peers import BranchPeers, NetworkPeers, PeerOutputs, member_seed
from codistill.sharing import Entry, Shared

CLASSES, SIZE = 5, 8
TREE = {"branch_at": ("layer2", "layer3"), "fan_out": (2, 2)}

# ----------------------------------------------------------------------------------------------------------------------
# The slow way: plain networks, some of whose layers are one and the same object


def plain_network(member, seed=0, name="resnet8"):
    """Build one network as member `member` of peers with `seed` must be built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(member_seed(seed, member))
        return resolve(name)(CLASSES).double()


def plain_branches(owners, seed=0, name="resnet8"):
    """Build networks in which layer `l` of network p is the very module of network `owners[l][p]`."""
    count = len(next(iter(owners.values())))
    networks = [plain_network(p, seed, name) for p in range(count)]
    for layer, owner in owners.items():
        parts = [getattr(networks[q], layer) for q in owner]
        for network, part in zip(networks, parts):
            setattr(network, layer, part)
    return networks


def fork_owners(count):
    return {layer: [0] * count for layer in ("conv1", "bn1", "layer1", "layer2")}


TREE_OWNERS = {"conv1": [0] * 4, "bn1": [0] * 4, "layer1": [0] * 4, "layer2": [0, 0, 2, 2]}


def slow_block(block, x):
    y = F.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(y))
    if isinstance(block.shortcut, nn.Sequential):
        x = block.shortcut[1](block.shortcut[0](x))
    return F.relu(y + x)


def slow_stem(network, x):
    return F.relu(network.bn1(network.conv1(x)))


def slow_head(network, x):
    features = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return features @ network.fc.weight.T + network.fc.bias, features


def slow_fork(networks, images):
    """Run the shared layers once, and every branch on what they give -> logits, features, trunk."""
    first = networks[0]
    trunk = slow_block(first.layer2[0], slow_block(first.layer1[0], slow_stem(first, images)))
    ends = [slow_head(network, slow_block(network.layer3[0], trunk)) for network in networks]
    return [z for z, _ in ends], [f for _, f in ends], trunk.sum((2, 3)) / (trunk.shape[2] * trunk.shape[3])


def slow_tree(networks, images):
    """Run the stem and layer1 once, layer2 of networks 0 and 2, and every layer3."""
    low = slow_block(networks[0].layer1[0], slow_stem(networks[0], images))
    limbs = {p: slow_block(networks[p].layer2[0], low) for p in (0, 2)}
    ends = [slow_head(n, slow_block(n.layer3[0], limbs[p - p % 2])) for p, n in enumerate(networks)]
    return [z for z, _ in ends], [f for _, f in ends], low.sum((2, 3)) / (low.shape[2] * low.shape[3])


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def branches(count=3, seed=0, spec="resnet8", **options):
    return BranchPeers(spec, count, CLASSES, seed=seed, image_size=SIZE, **options).double()


def networks(count=3, seed=0, spec="resnet8", **options):
    return NetworkPeers(spec, count, CLASSES, seed=seed, image_size=SIZE, **options).double()


def some_images(count=6, views=None):
    shape = (count, 3, SIZE, SIZE) if views is None else (views, count, 3, SIZE, SIZE)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def loss_of(logits, features):
    """Return a loss that treats every member otherwise and couples them."""
    targets = torch.arange(logits[0].shape[0]) % CLASSES
    mean = sum(z.softmax(-1) for z in logits) / len(logits)
    loss = (mean**2).sum()
    for p, (z, f) in enumerate(zip(logits, features)):
        loss = loss + (p + 1) * F.cross_entropy(z, targets) + 0.1 * p * (f**2).mean()
    return loss


def named(peers, index):
    """Return the parameters and buffers of a member under the names that they have in the plain network."""
    member = peers.members[index]
    found = {
        name.replace("inner.", ""): tensor
        for part in (member.body.named_parameters, member.body.named_buffers)
        for name, tensor in part(remove_duplicate=False)
    }
    found |= {f"{member.head_path}.{name}": tensor for name, tensor in member.head.named_parameters()}
    return found


def assert_same_state(peers, plains, tolerance=1e-12):
    """Check every parameter, gradient and running statistic of every member."""
    for index, plain in enumerate(plains):
        mine = named(peers, index)
        theirs = dict(plain.named_parameters()) | dict(plain.named_buffers())
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            close = {"rtol": tolerance, "atol": tolerance, "msg": lambda text, name=name: f"{name}: {text}"}
            torch.testing.assert_close(mine[name], tensor, **close)
            if isinstance(tensor, nn.Parameter):
                torch.testing.assert_close(mine[name].grad, tensor.grad, **close)


def count_parameters(module):
    return sum({id(p): p.numel() for p in module.parameters()}.values())


def owners_of(peers, layer):
    """Return, for every member, the first member that holds the same first parameter of `layer`."""
    firsts = [id(next(member.body.get_submodule(layer).parameters())) for member in peers.members]
    return [firsts.index(first) for first in firsts]


def gradients(peers, images):
    """Return the gradients of a member-wise loss by plain name, one dict a member."""
    outputs = peers(images)
    peers.zero_grad()
    loss_of(outputs.logits_PBC, outputs.features).backward()
    return [
        {name: t.grad.clone() for name, t in named(peers, p).items() if isinstance(t, nn.Parameter)}
        for p in range(peers.num_peers)
    ]


class SmallNet(nn.Module):
    """Two convolutions, with the activation where the test wants it."""

    def __init__(self, num_classes=CLASSES, width=6, inplace=False, activation="module"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(4, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)
        self.activation = activation

    def forward(self, x):
        x = self.norm(self.conv1(x))
        if self.activation == "function":
            x = F.relu(x, inplace=True)
        else:
            x = self.relu(x)
        x = self.conv2(x)
        if self.activation == "both sides":
            x = self.relu(x)
        return self.fc(x.mean((2, 3)))


class TinyViT(nn.Module):
    """A class token and positions that hang on the root, and blocks in an nn.ModuleList."""

    def __init__(self, num_classes=CLASSES, width=8, depth=3):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def tokens(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position

    def forward(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x)[:, 0])


# ----------------------------------------------------------------------------------------------------------------------
# Sizes

COUNTS = [
    ("resnet32", 1, 472_756),
    ("resnet110", 1, 1_170_868),
    ("wrn16_2", 1, 703_284),
    ("resnet32", 4, 1_891_024),
]


@pytest.mark.parametrize(("name", "count", "parameters"), COUNTS)
def test_networks_have_the_papers_number_of_parameters(name, count, parameters):
    assert count_parameters(NetworkPeers(name, count, 100, image_size=SIZE)) == parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet32", 1_553_248), ("resnet110", 3_857_632)])
def test_four_branches_have_the_papers_number_of_parameters(name, parameters):
    assert count_parameters(BranchPeers(name, 4, 100, image_size=SIZE)) == parameters


def test_a_tree_has_one_trunk_two_limbs_and_four_branches():
    plain = dict(plain_network(0).named_parameters())
    size = {part: sum(t.numel() for n, t in plain.items() if n.startswith(part)) for part in ("layer2", "layer3", "fc")}
    whole = sum(t.numel() for t in plain.values())
    assert count_parameters(branches(4, **TREE)) == whole + size["layer2"] + 3 * (size["layer3"] + size["fc"])


def test_parameters_are_listed_once_for_the_optimiser():
    listed = list(branches(4, **TREE).parameters())
    assert len({id(p) for p in listed}) == len(listed)


# ----------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("seed", [0, 3])
def test_peer_0_of_networks_is_the_plain_network_built_under_its_member_seed_and_so_are_the_others(seed):
    peers = networks(3, seed)
    for p in range(3):
        for name, tensor in plain_network(p, seed).named_parameters():
            assert torch.equal(named(peers, p)[name], tensor), name


def test_every_member_is_initialised_on_its_own():
    peers = networks(3)
    for name, tensor in peers.export_member(0).named_parameters():
        if tensor.dim() > 1:  # BatchNorm starts from constants
            others = [tensor, named(peers, 1)[name], named(peers, 2)[name]]
            for p, q in ((0, 1), (0, 2), (1, 2)):
                assert (others[p] != others[q]).double().mean() > 0.99, name


def test_every_branch_is_initialised_on_its_own_and_the_trunk_is_that_of_branch_0():
    peers, whole = branches(3), networks(3)
    for p in range(3):
        for name, tensor in named(whole, p).items():
            own = name.startswith(("layer3", "fc"))
            expected = tensor if own else named(whole, 0)[name]
            assert torch.equal(named(peers, p)[name], expected), name


@pytest.mark.parametrize("build", [networks, branches])
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(build):
    first, second, other = build(3, 5), build(3, 5), build(3, 6)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize("build", [networks, branches])
def test_building_peers_leaves_the_callers_random_state_alone(build):
    torch.manual_seed(42)
    before = torch.get_rng_state()
    build(2, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(43)
    assert torch.equal(build(2, 1).members[1].head.weight, build(2, 1).members[1].head.weight)


@pytest.mark.parametrize("build", [networks, branches])
def test_a_member_is_the_same_whatever_the_number_of_peers(build):
    few, many = build(2, 4), build(4, 4)
    for p in range(2):
        for name, tensor in named(few, p).items():
            assert torch.equal(named(many, p)[name], tensor), name


def test_seeds_of_members_do_not_collide():
    seeds = {member_seed(seed, member) for seed in range(30) for member in range(30)}
    assert len(seeds) == 900


# ----------------------------------------------------------------------------------------------------------------------
# What may be given


def test_one_built_network_cannot_be_several_peers():
    with pytest.raises(InputError, match="a name, a callable or a list"):
        networks(2, spec=SmallNet())
    with pytest.raises(InputError, match="a name or a callable"):
        branches(2, spec=SmallNet())
    assert networks(1, spec=SmallNet()).num_peers == 1


@pytest.mark.parametrize("build", [networks, branches])
def test_a_callable_that_returns_one_and_the_same_network_is_refused(build):
    network = plain_network(0)
    with pytest.raises(InputError, match="same built model"):
        build(2, spec=lambda: network)


def test_the_same_module_twice_in_a_list_is_refused():
    network = SmallNet()
    with pytest.raises(InputError, match="the same built model is given twice"):
        NetworkPeers([network, SmallNet(), network], image_size=SIZE)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_heads_that_end_in_different_numbers_of_classes_are_refused(num_classes):
    with pytest.raises(InputError, match="5, 6 classes"):
        NetworkPeers([SmallNet(5), SmallNet(6)], num_classes=num_classes, image_size=SIZE)


def test_heads_that_end_in_another_number_of_classes_than_asked_for_are_refused():
    for build in (NetworkPeers, BranchPeers):
        options = {"branch_at": "conv2"} if build is BranchPeers else {}
        with pytest.raises(InputError, match="all need 7"):
            build(lambda: SmallNet(5), 2, 7, image_size=SIZE, **options)


def test_a_callable_gets_classes_and_channels_if_its_signature_takes_them():
    seen = []

    def both(num_classes, in_channels):
        seen.append(("both", num_classes, in_channels))
        return resolve("resnet8")(num_classes, in_channels)

    def classes_only(num_classes=3):
        seen.append(("classes", num_classes))
        return resolve("resnet8")(num_classes, 1)

    def neither():
        seen.append(("neither",))
        return resolve("resnet8")(CLASSES, 1)

    def open_ended(**options):
        seen.append(("open", sorted(options)))
        return resolve("resnet8")(options["num_classes"], 1)

    def channels_and_more(num_classes, in_channels=3, **options):
        seen.append(("more", num_classes, in_channels, options))
        return resolve("resnet8")(num_classes, in_channels)

    specs = [both, classes_only, neither, open_ended, channels_and_more]
    peers = NetworkPeers(specs, None, CLASSES, in_channels=1, image_size=SIZE)
    assert seen == [
        ("both", CLASSES, 1),
        ("classes", CLASSES),
        ("neither",),
        ("open", ["num_classes"]),
        ("more", CLASSES, 1, {}),
    ]
    assert peers(torch.zeros(2, 1, SIZE, SIZE)).logits_PBC.shape == (5, 2, CLASSES)


def test_without_num_classes_the_networks_say_how_many():
    assert NetworkPeers([SmallNet(4), SmallNet(4)], image_size=SIZE).num_classes == 4
    assert BranchPeers(lambda: SmallNet(4), 2, branch_at="conv2", image_size=SIZE).num_classes == 4
    assert NetworkPeers("resnet8", 2, image_size=SIZE).num_classes == 100


def test_networks_of_different_widths_stand_side_by_side():
    peers = NetworkPeers(
        [lambda num_classes: SmallNet(num_classes, 6), lambda num_classes: SmallNet(num_classes, 9), "resnet8"],
        None,
        CLASSES,
        image_size=SIZE,
    )
    assert peers.feature_dims == [6, 9, 64]
    outputs = peers(torch.zeros(2, 3, SIZE, SIZE))
    assert [f.shape for f in outputs.features] == [(2, 6), (2, 9), (2, 64)]
    assert outputs.logits_PBC.shape == (3, 2, CLASSES)


def test_as_many_models_as_peers_or_one_are_needed():
    with pytest.raises(InputError, match="2 models are given for 3 peers"):
        NetworkPeers(["resnet8", "resnet8"], 3, image_size=SIZE)
    for build in (NetworkPeers, BranchPeers):
        with pytest.raises(InputError, match="0 peers"):
            build("resnet8", 0, image_size=SIZE)
    with pytest.raises(InputError, match="0 peers"):
        NetworkPeers([], image_size=SIZE)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 5, 3), lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten())])
def test_a_network_without_a_linear_layer_is_refused(make):
    with pytest.raises(InputError, match=r"no nn\.Linear inside"):
        NetworkPeers(make, 2, image_size=SIZE)


def test_a_head_path_without_a_linear_layer_is_refused():
    class ConvolutionalHead(nn.Module):
        head_path = "head"

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, CLASSES, 1)

        def forward(self, x):
            return self.head(self.body(x)).mean((2, 3))

    with pytest.raises(InputError, match=r"head.*nn\.Linear"):
        NetworkPeers(ConvolutionalHead, 2, image_size=SIZE)


class HeadFirst(nn.Module):
    """A network that lists its head before its other linear layers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, CLASSES)
        self.stem, self.last = nn.Linear(3 * SIZE * SIZE, 9), nn.Linear(9, 9)

    def forward(self, x):
        return self.head(self.last(self.stem(x.flatten(1)).relu()))


@pytest.mark.parametrize("build", [networks, branches])
def test_a_head_that_is_not_the_last_linear_layer_is_found_by_trying_or_by_its_name(build):
    options = {"branch_at": "last"} if build is branches else {}
    assert build(2, spec=HeadFirst, **options).member(1).head_path == "head"

    class Scaled(HeadFirst):
        def forward(self, x):
            return super().forward(x) * 2  # whatever is called last, the logits are not its output

    with pytest.raises(InputError, match=r"Scaled.*last.*head_path"):
        build(2, spec=Scaled, **options)

    class Named(HeadFirst):
        head_path = "head"

    peers = build(2, spec=Named, **options)
    assert peers.feature_dims == [9, 9]
    assert peers(some_images()).logits_PBC.shape == (2, 6, CLASSES)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def test_networks_give_the_outputs_and_gradients_of_plain_networks():
    peers, plains = networks(3), [plain_network(p) for p in range(3)]
    images = some_images()
    outputs = peers(images)
    logits = [plain(images) for plain in plains]
    features = [plain.forward_features(images).detach() for plain in plains]
    for p in range(3):
        torch.testing.assert_close(outputs.logits_PBC[p], logits[p], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outputs.features[p], features[p], rtol=1e-12, atol=1e-12)
    assert outputs.trunk_BD is None
    assert peers.trunk_dim is None
    targets = torch.arange(6) % CLASSES
    sum((p + 1) * F.cross_entropy(z, targets) for p, z in enumerate(outputs.logits_PBC)).backward()
    sum((p + 1) * F.cross_entropy(z, targets) for p, z in enumerate(logits)).backward()
    for p, plain in enumerate(plains):
        for name, tensor in plain.named_parameters():
            torch.testing.assert_close(named(peers, p)[name].grad, tensor.grad, rtol=1e-10, atol=1e-12)


def test_every_network_sees_its_own_view():
    peers, plains = networks(3).eval(), [plain_network(p).eval() for p in range(3)]
    views = some_images(views=3)
    outputs = peers(views)
    for p in range(3):
        torch.testing.assert_close(outputs.logits_PBC[p], plains[p](views[p]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("views", [None, 3])
def test_a_member_that_speaks_again_says_what_it_says_now_and_leaves_no_trace(views):
    peers, plain = networks(3), plain_network(1)
    images = some_images(views=views)
    outputs = peers(images)
    said = PeerOutputs(outputs.logits_PBC.detach().clone(), [f.detach() for f in outputs.features])
    with torch.no_grad():
        for module in (peers.members[1], plain):
            for parameter in module.parameters():
                parameter.mul_(1.1)
    before = copy.deepcopy(peers.state_dict())
    peers.refresh(said, images, 1)
    x = images if views is None else images[1]
    torch.testing.assert_close(said.logits_PBC[1], plain(x), rtol=1e-12, atol=1e-12)  # by batch statistics
    assert not torch.equal(said.logits_PBC[1], outputs.logits_PBC[1])
    torch.testing.assert_close(peers.members[1].head(said.features[1]), said.logits_PBC[1], rtol=1e-12, atol=1e-12)
    for p in (0, 2):
        assert torch.equal(said.logits_PBC[p], outputs.logits_PBC[p])
        assert torch.equal(said.features[p], outputs.features[p])
    assert all(torch.equal(value, before[name]) for name, value in peers.state_dict().items())
    assert not said.logits_PBC.requires_grad
    assert all(m.track_running_stats for m in peers.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("build", [networks, branches])
def test_one_view_may_come_with_or_without_its_axis(build):
    peers, images = build(3).eval(), some_images()
    assert torch.equal(peers(images).logits_PBC, peers(images.unsqueeze(0)).logits_PBC)


@pytest.mark.parametrize("build", [networks, branches])
@pytest.mark.parametrize("views", [2, 4])
def test_another_number_of_views_than_1_or_one_a_peer_is_refused(build, views):
    with pytest.raises(InputError, match=f"{views} views for 3 peers"):
        build(3)(some_images(views=views))


@pytest.mark.parametrize("build", [networks, branches])
def test_features_are_what_the_head_takes(build):
    peers = build(3)
    outputs = peers(some_images())
    for p, member in enumerate(peers.members):
        logits = outputs.features[p] @ member.head.weight.T + member.head.bias
        torch.testing.assert_close(outputs.logits_PBC[p], logits, rtol=1e-12, atol=1e-12)


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


def test_a_fork_inside_a_block_shares_what_comes_before_but_cannot_rescale_what_goes_around_it():
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


def test_the_trunk_is_found_by_the_order_of_running_and_not_of_naming():
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
        module = module.inner if isinstance(module, Shared) else module
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
        if isinstance(module, Shared):
            assert module._outputs == []
        if isinstance(module, Entry):
            assert module.seen is None


# ----------------------------------------------------------------------------------------------------------------------
# Rescaling


def test_rescaling_divides_the_gradient_of_the_trunk_by_the_number_of_branches():
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
def test_rescaling_a_tree_divides_at_every_fork_by_its_own_fan_out(fan_out):
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


def test_rescaling_is_refused_where_a_skip_connection_goes_around_the_fork():
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
def test_equal_branches_with_rescaling_train_the_trunk_like_one_network(options):
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


# ----------------------------------------------------------------------------------------------------------------------
# One plain network, and states


def assert_plain(network):
    assert not [name for name, module in network.named_modules() if isinstance(module, Shared | Entry)]


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


def test_a_deep_copy_shares_within_itself_and_not_with_the_original():
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


def test_training_and_evaluation_mode_reach_the_shared_layers_and_are_kept_while_building():
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


# ----------------------------------------------------------------------------------------------------------------------
# Networks of other shapes


def test_parameters_on_the_root_are_shared_and_get_the_gradients_of_every_branch():
    peers = branches(3, spec=TinyViT, branch_at="blocks.1")
    assert len({id(member.body.token) for member in peers.members}) == 1
    assert len({id(member.body.position) for member in peers.members}) == 1
    assert owners_of(peers, "patch") == owners_of(peers, "blocks.0") == [0, 0, 0]
    assert owners_of(peers, "blocks.1") == owners_of(peers, "blocks.2") == owners_of(peers, "norm") == [0, 1, 2]

    plains = [peers.export_member(p) for p in range(3)]
    for plain in plains[1:]:
        plain.token, plain.position, plain.patch = plains[0].token, plains[0].position, plains[0].patch
        plain.blocks[0] = plains[0].blocks[0]
    images = some_images()
    x = plains[0].tokens(images)
    trunk = x + plains[0].blocks[0](x)
    features = [plain.norm((y := trunk + plain.blocks[1](trunk)) + plain.blocks[2](y))[:, 0] for plain in plains]
    logits = [plain.head(f) for plain, f in zip(plains, features)]
    outputs = peers(images)
    torch.testing.assert_close(outputs.logits_PBC, torch.stack(logits), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs.trunk_BD, trunk.sum(1) / 5, rtol=1e-10, atol=1e-10)
    loss_of(outputs.logits_PBC, outputs.features).backward()
    loss_of(logits, features).backward()
    assert plains[0].token.grad.abs().max() > 0
    assert_same_state(peers, plains, 1e-10)


def test_parameters_on_a_module_between_two_forks_are_shared_by_its_limb():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 1, 1))
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.second(self.first(x) * self.scale)

    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.low, self.high = nn.Conv2d(3, 4, 3, padding=1), Scaled(), Scaled()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.high(self.low(self.stem(x))).mean((2, 3)))

    peers = branches(4, spec=Staged, branch_at=("low", "high.second"), fan_out=(2, 2))
    scales = [id(member.body.high.scale) for member in peers.members]
    assert [scales.index(s) for s in scales] == [0, 0, 2, 2]
    assert owners_of(peers, "low.first") == owners_of(peers, "high.first") == [0, 0, 2, 2]
    plains = [peers.export_member(p) for p in range(4)]
    outputs = peers(some_images())
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(outputs.logits_PBC, logits, rtol=1e-10, atol=1e-10)


def test_layers_may_sit_in_a_module_list():
    class Listed(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.stages = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
            self.fc = nn.Linear(3, num_classes)

        def forward(self, x):
            for stage, norm in zip(self.stages, self.norms):
                x = norm(stage(x)).tanh()
            return self.fc(x.mean((2, 3)))

    peers = branches(3, spec=Listed, branch_at="stages.2")
    for layer, owners in (("stages.1", [0, 0, 0]), ("norms.1", [0, 0, 0]), ("stages.2", [0, 1, 2])):
        assert owners_of(peers, layer) == owners, layer
    assert owners_of(peers, "norms.2") == [0, 1, 2]
    plains = [peers.export_member(p) for p in range(3)]
    images = some_images()
    outputs = peers(images)
    logits = torch.stack([plain(images) for plain in plains])
    torch.testing.assert_close(outputs.logits_PBC, logits, rtol=1e-10, atol=1e-10)
    assert int(named(peers, 2)["norms.0.num_batches_tracked"]) == 1


def test_a_module_that_runs_twice_before_the_fork_is_replayed_call_by_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.again(self.again(x).tanh())
            return self.fc(self.last(x).mean((2, 3)))

    peers = branches(3, spec=Twice, branch_at="last")
    plains = [peers.export_member(p) for p in range(3)]
    images = some_images()
    logits = torch.stack([plain(images) for plain in plains])
    torch.testing.assert_close(peers(images).logits_PBC, logits, rtol=1e-12, atol=1e-12)
    assert owners_of(peers, "again") == [0, 0, 0]


def test_a_network_may_branch_at_its_classifier_alone():
    peers = branches(3, branch_at="fc")
    assert owners_of(peers, "layer3") == [0, 0, 0]
    assert len({id(member.head.weight) for member in peers.members}) == 3
    outputs = peers(some_images())
    torch.testing.assert_close(outputs.trunk_BD, outputs.features[1], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("fork", ["layer4", "layer3.7", "fc.weight", "conv"])
def test_a_fork_that_is_no_module_is_an_error_that_lists_the_modules(fork):
    with pytest.raises(InputError, match=f'--branch-at "{fork}".*layer3'):
        branches(2, branch_at=fork)


def test_a_fork_that_never_runs_is_refused():
    class Idle(SmallNet):
        def __init__(self):
            super().__init__()
            self.idle = nn.Conv2d(3, 3, 1)

    with pytest.raises(InputError, match="must run"):
        branches(2, spec=Idle, branch_at="idle")


@pytest.mark.parametrize("forks", [("layer3", "layer2"), ("layer3", "layer3")])
def test_forks_in_the_wrong_order_or_given_twice_are_refused(forks):
    with pytest.raises(InputError, match="in this order"):
        branches(4, branch_at=forks, fan_out=(2, 2))


@pytest.mark.parametrize(
    ("count", "forks", "fan_out"),
    [
        (4, ("layer2", "layer3"), ()),
        (4, ("layer2", "layer3"), (4,)),
        (4, ("layer2", "layer3"), (2, 3)),
        (4, (), (2, 2)),
        (4, "layer3", (3,)),
        (3, ("layer2", "layer3"), (2, 2)),
    ],
)
def test_a_fan_out_that_does_not_make_the_branches_is_refused(count, forks, fan_out):
    with pytest.raises(InputError, match="--fan-out"):
        branches(count, branch_at=forks, fan_out=fan_out)


def test_a_network_without_a_place_of_its_own_needs_branch_at():
    with pytest.raises(InputError, match="--branch-at is needed: SmallNet"):
        branches(2, spec=SmallNet)


class BothSides(nn.Module):
    """One module, with parameters or statistics, that runs before and after conv2."""

    def __init__(self, used_twice):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.common, self.fc = used_twice, nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.common(self.conv2(self.common(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm2d(4), lambda: nn.BatchNorm2d(4, affine=False), lambda: nn.Conv2d(4, 4, 1)]
)
def test_a_module_with_a_state_on_both_sides_of_the_fork_is_refused(make):
    with pytest.raises(InputError, match='"common" runs before and after'):
        branches(2, spec=lambda: BothSides(make()), branch_at="conv2")


def test_a_module_without_a_state_may_run_on_both_sides_of_the_fork():
    peers = branches(2, spec=lambda: BothSides(nn.Tanh()), branch_at="conv2")
    plains = [peers.export_member(p) for p in range(2)]
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(peers(some_images()).logits_PBC, logits, rtol=1e-12, atol=1e-12)


IN_PLACE = {
    "a branch that begins with an in-place ReLU": ("relu", {"inplace": True}),
    "an in-place ReLU between trunk and branch": ("conv2", {"activation": "function"}),
    "one in-place ReLU for both sides": ("conv2", {"activation": "both sides", "inplace": True}),
}


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("rescale", [False, True])
def test_a_branch_that_writes_into_what_the_trunk_gave_is_refused(case, rescale):
    # Such a ReLU leaves every output right (it does nothing the second time), but backward would fail.
    fork, options = IN_PLACE[case]
    with pytest.raises(InputError, match=f'--branch-at "{fork}".*in place'):
        branches(2, spec=lambda: SmallNet(**options), branch_at=fork, rescale=rescale)


def test_a_branch_that_adds_to_what_the_trunk_gave_is_refused():
    class Adder(nn.Module):
        def forward(self, x):
            return x.add_(1.0)

    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.add, self.fc = nn.Conv2d(3, 4, 3), Adder(), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.fc(self.add(self.conv(x)).mean((2, 3)))

    with pytest.raises(InputError, match="in place"):
        branches(2, spec=Adding, branch_at="add")


@pytest.mark.parametrize("fork", ["conv2", "relu"])
def test_in_place_layers_within_the_trunk_or_a_branch_are_fine(fork):
    inplace = fork == "conv2"  # before conv2 the ReLU is the trunk's own
    peers = branches(2, spec=lambda: SmallNet(inplace=inplace), branch_at=fork)
    plains = [peers.export_member(p) for p in range(2)]
    loss_of(*_ends(peers(some_images()))).backward()
    assert named(peers, 0)["conv1.weight"].grad.abs().max() > 0
    logits = torch.stack([plain(some_images()) for plain in plains])
    torch.testing.assert_close(peers(some_images()).logits_PBC, logits, rtol=1e-12, atol=1e-12)


def _ends(outputs):
    return outputs.logits_PBC, outputs.features
