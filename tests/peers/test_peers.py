"""Peers against plain networks that are put together by hand, layer by layer, in float64."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.models import resolve
from codistill.peers.base import PeerOutputs
from codistill.peers.branches import BranchPeers
from codistill.peers.hybrid import hybrid_network
from codistill.peers.members import member_seed
from codistill.peers.networks import NetworkPeers
from codistill.utils.errors import InputError
from helpers.peer_networks import (
    CLASSES,
    SIZE,
    TREE,
    SmallNet,
    branches,
    count_parameters,
    named,
    networks,
    plain_network,
    some_images,
)

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
def test_each_network_is_the_one_built_from_its_member_seed(seed):
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


def test_branches_have_own_weights_and_the_trunk_of_branch_0():
    peers, whole = branches(3), networks(3)
    for p in range(3):
        for name, tensor in named(whole, p).items():
            own = name.startswith(("layer3", "fc"))
            expected = tensor if own else named(whole, 0)[name]
            assert torch.equal(named(peers, p)[name], expected), name


@pytest.mark.parametrize("build", [networks, branches])
def test_weights_depend_on_the_seed_alone(build):
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
def test_a_callable_that_returns_the_same_network_is_refused(build):
    network = plain_network(0)
    with pytest.raises(InputError, match="returned the same one twice; let it build a new one"):
        build(2, spec=lambda: network)


@pytest.mark.parametrize("build", [NetworkPeers, BranchPeers])
def test_a_callable_that_returns_no_network_is_refused(build):
    with pytest.raises(InputError, match=r"returned NoneType; it must return an nn.Module"):
        build(lambda: None, 2, image_size=SIZE)


def test_peers_that_begin_as_copies_are_warned_of():
    def seeded():
        torch.manual_seed(0)
        return SmallNet()

    with pytest.warns(UserWarning, match="all 2 peers begin with the same weights"):
        NetworkPeers(seeded, 2, image_size=SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NetworkPeers(SmallNet, 2, image_size=SIZE)
        NetworkPeers(SmallNet, 2, image_size=SIZE, same_start=True)
        NetworkPeers(seeded, 1, image_size=SIZE)


def test_branches_of_a_network_that_is_all_frozen_are_built():
    peers = BranchPeers(lambda: SmallNet().requires_grad_(False), 2, branch_at="conv2", image_size=SIZE)
    assert peers(torch.zeros(2, 3, SIZE, SIZE)).logits_PBC.shape[:2] == (2, 2)


class Tied(nn.Module):
    """Its head has the weight of its embedding."""

    def __init__(self, num_classes):
        super().__init__()
        self.embed, self.mix = nn.Embedding(num_classes, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens).mean(1)))


def test_a_weight_that_head_and_body_share_is_shared_in_the_student_too():
    tokens = torch.arange(12).reshape(4, 3) % 5
    peers = NetworkPeers(Tied, 2, 5, example=tokens)
    student = peers.export_member(1)
    assert student.head.weight is student.embed.weight
    assert student.head.weight is not peers.member(1).head.weight
    torch.testing.assert_close(student(tokens), peers(tokens).logits_PBC[1])
    mean = hybrid_network(peers)
    torch.testing.assert_close(mean(tokens), peers.hybrid_logits(tokens))


def test_the_same_module_twice_in_a_list_is_refused():
    network = SmallNet()
    with pytest.raises(InputError, match="the same built model is given twice"):
        NetworkPeers([network, SmallNet(), network], image_size=SIZE)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_heads_with_different_numbers_of_classes_are_refused(num_classes):
    with pytest.raises(InputError, match="5, 6 classes"):
        NetworkPeers([SmallNet(5), SmallNet(6)], num_classes=num_classes, image_size=SIZE)


def test_heads_with_a_wrong_number_of_classes_are_refused():
    for build in (NetworkPeers, BranchPeers):
        options = {"branch_at": "conv2"} if build is BranchPeers else {}
        with pytest.raises(InputError, match="all need 7"):
            build(lambda: SmallNet(5), 2, 7, image_size=SIZE, **options)


def test_a_callable_gets_the_parameters_in_its_signature():
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


def test_a_head_path_without_a_classifier_layer_is_refused():
    class ConvolutionalHead(nn.Module):
        head_path = "head"

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, CLASSES, 3)

        def forward(self, x):
            return self.head(self.body(x)).mean((2, 3))

    with pytest.raises(InputError, match=r"head.*nn\.Linear and no 1 x 1 convolution"):
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
def test_a_head_before_the_last_linear_layer_is_found(build):
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


@pytest.mark.parametrize("in_training_only", [False, True])
@pytest.mark.parametrize("error", [RuntimeError(), AssertionError(), KeyError()])
def test_an_error_without_a_message_is_named_by_its_class(error, in_training_only):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 5)

        def forward(self, x):
            if self.training or not in_training_only:
                raise error
            return self.fc(x.mean((2, 3)))

    with pytest.raises(InputError, match=rf"--model Silent cannot .* \({type(error).__name__}\); (fix|give) "):
        NetworkPeers(Silent, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


def test_networks_equal_plain_networks_with_gradients():
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
def test_rerunning_a_member_uses_its_current_weights(views):
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
