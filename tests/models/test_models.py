"""The built-in networks: their sizes, the contract that peers and exports rely on, and what a branch is made of."""

import ast
import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from codistill.models import MODELS, source_of
from codistill.peers.branches import BranchPeers
from codistill.peers.shared_trunk import SharedModule

# Parameters at 100 and at 10 classes, and million multiply-adds for an image of 3 x 32 x 32 at 100 classes.
SIZES = {
    "resnet8": (83_892, 78_042, 12.5),
    "resnet20": (278_324, 272_474, 40.8),
    "resnet32": (472_756, 466_906, 69.1),
    "resnet56": (861_620, 855_770, 125.8),
    "resnet110": (1_170_868, 1_147_738, 167.5),
    "resnet110_basic": (1_736_564, 1_730_714, 253.2),
    "wrn16_2": (703_284, 691_674, 101.1),
    "wrn40_2": (2_255_156, 2_243_546, 327.6),
    "wrn20_8": (6_871_220, 6_848_090, 1022.8),
    "vgg16": (15_299_748, 15_253_578, 313.8),
    "vgg19": (20_612_004, 20_565_834, 398.7),
    "vgg16_no_dropout": (15_299_748, 15_253_578, 313.8),
    "vgg19_no_dropout": (20_612_004, 20_565_834, 398.7),
    "densenet40_12": (188_092, 176_122, 72.4),
    "densenet40_12_plain": (1_060_132, 1_019_722, 264.9),
    "densenet100_12": (800_032, 769_162, 288.0),
}

# Members, classes, parameters of the branches, and with OKDDip's two projections where the authors' program has them.
BRANCHES = [
    ("resnet32", 4, 100, 1_553_248, 1_554_272),
    ("resnet32", 4, 10, 1_529_848, 1_530_872),
    ("resnet110", 4, 100, 3_857_632, 3_874_016),
    ("resnet110", 4, 10, 3_765_112, 3_781_496),
    ("wrn20_8", 4, 100, 22_595_552, 22_611_936),
    ("vgg16", 4, 100, 38_277_072, 38_342_608),
    ("vgg16", 4, 10, 38_092_392, 38_157_928),
    ("vgg19", 4, 100, 50_671_824, 50_737_360),
    ("densenet40_12", 4, 100, 404_824, 409_048),
    ("densenet40_12", 4, 10, 356_944, 361_168),
]

# One of each kind, as small as it comes, for what does not depend on the depth.
KINDS = ["resnet8", "wrn16_2", "vgg16", "densenet40_12"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def images(channels: int = 3, size: int = 8, views: int = 0) -> Tensor:
    shape = (2, channels, size, size)
    return torch.randn(views, *shape) if views else torch.randn(shape)


def branches(name: str, num_peers: int = 2, size: int = 8, **options: int) -> BranchPeers:
    return BranchPeers(name, num_peers, image_size=size, **options)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_every_network_has_a_size_here():
    assert set(SIZES) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds(name):
    with torch.device("meta"):
        assert count(MODELS[name](num_classes=10)) == SIZES[name][1]
        network = MODELS[name]().eval()
        assert count(network) == SIZES[name][0]
        total = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda m, _, out: total.append(out[0].numel() * m.weight[0].numel()))
        assert network(torch.empty(1, 3, 32, 32)).shape == (1, 100)
    assert sum(total) / 1e6 == pytest.approx(SIZES[name][2], abs=0.05)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (4, 28)])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_at_any_size_and_channels(name, channels, size):
    with torch.device("meta"):
        network = MODELS[name](num_classes=7, in_channels=channels)
        features = network.forward_features(torch.empty(2, channels, size, size))
        assert features.shape == (2, network.num_features)
        assert network.forward_head(features).shape == (2, 7)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
@pytest.mark.parametrize("name", KINDS)
def test_forward_is_head_of_features(name, channels, size):
    network = MODELS[name](num_classes=5, in_channels=channels).eval()
    x = images(channels, size)
    logits = network(x)
    torch.testing.assert_close(logits, network.forward_head(network.forward_features(x)), rtol=0, atol=0)
    torch.testing.assert_close(logits, network.get_submodule(network.head_path)(network.forward_features(x)))
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.parametrize("name", KINDS)
def test_convolutions_start_from_kaiming_fan_out_and_densenets_from_fan_in(name):
    for module in MODELS[name]().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5_000:
            maps = module.in_channels if name.startswith("densenet") else module.out_channels
            fan = maps * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan), rel=0.05)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()


def test_densenet_starts_with_the_published_deviations():
    torch.manual_seed(0)
    networks = [MODELS["densenet40_12"]() for _ in range(20)]
    expected = {"conv1": 0.272, "block1.0.layers.5": 0.068, "block3.5.layers.2": 0.129 * (120 / 120) ** 0.5}
    for path, deviation in (expected | {"transition1.2": 0.1443}).items():
        weights = torch.stack([network.get_submodule(path).weight for network in networks])
        assert weights.std().item() == pytest.approx(deviation, rel=0.02), path


def test_wide_bottlenecks_are_wide_inside_only():
    with torch.device("meta"):
        network = MODELS["wrn20_8"]()
    stages = [network.layer1, network.layer2, network.layer3]
    assert [stage[0].conv2.out_channels for stage in stages] == [128, 256, 512]
    assert [stage[1].conv3.out_channels for stage in stages] == [64, 128, 256]
    assert [stage[0].conv2.stride[0] for stage in stages] == [1, 2, 2]


def test_vgg_drops_units_in_training_only_and_as_told():
    x = images()
    network = MODELS["vgg16"](num_classes=5)
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    head = network.classifier.train()
    features = torch.rand(2, 512)
    assert not torch.equal(head(features), head(features))
    assert torch.equal(network.eval()(x), network(x))
    never = MODELS["vgg16"](num_classes=5, dropout=0.0).classifier.train()
    assert torch.equal(never(features), never(features))


def test_vgg_pools_as_usual_where_the_sizes_are_even():
    with torch.device("meta"):
        network = MODELS["vgg16"]()
        x = torch.empty(1, 3, 32, 32)
        for size, stage in zip((16, 8, 4, 2, 1), network.children()):
            x = stage(x)
            assert x.shape[-2:] == (size, size)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("densenet40_12", (24, 96, 48, 120, 60, 132)),
        ("densenet100_12", (24, 216, 108, 300, 150, 342)),
        ("densenet40_12_plain", (16, 160, 160, 304, 304, 448)),
    ],
)
def test_densenet_widths(name, widths):
    with torch.device("meta"):
        network = MODELS[name]()
        x = torch.empty(1, 3, 32, 32)
        seen = []
        for module in list(network.children())[:6]:
            x = module(x)
            seen.append(x.shape[1])
    assert tuple(seen) == widths
    assert x.shape[-1] == 8


@pytest.mark.parametrize("name", KINDS[1:])
def test_a_file_of_networks_needs_torch_alone(name):
    tree = ast.parse(source_of(name))
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] == "torch" for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] == "torch"


@pytest.mark.parametrize("name", MODELS)
def test_builders_take_the_same_arguments(name):
    parameters = inspect.signature(MODELS[name]).parameters
    assert parameters["num_classes"].default == 100
    assert parameters["in_channels"].default == 3
    assert MODELS[name].__name__ == name  # student.py calls it by this name


@pytest.mark.parametrize(("name", "num_peers", "num_classes", "own", "with_projections"), BRANCHES)
def test_branch_parameters(name, num_peers, num_classes, own, with_projections):
    # Counted from one network on no device: the trunk once, and what runs from the fork on once a branch.
    with torch.device("meta"):
        network = MODELS[name](num_classes=num_classes)
    top = [child for child, _ in network.named_children()]
    trunk = sum(count(network.get_submodule(child)) for child in top[: top.index(network.branch_at)])
    counted = trunk + num_peers * (count(network) - trunk)
    assert counted == own
    width = network.num_features
    assert counted + 2 * width * (width // 8) == with_projections


@pytest.mark.parametrize(
    ("name", "num_classes", "own", "with_projections"),
    [(n, c, own, full) for n, _, c, own, full in BRANCHES if c == 100 and n != "vgg19"],
)
def test_branch_peers_have_these_parameters(name, num_classes, own, with_projections):
    peers = branches(name, 4, num_classes=num_classes)
    assert count(peers) == own
    width = peers.feature_dims[0]
    assert peers.feature_dims == [width] * 4
    assert count(peers) + 2 * width * (width // 8) == with_projections


def test_densenet_branches_of_pcl():
    # Three branches and the classifier over their features side by side: 372,280.
    peers = branches("densenet40_12", 3, num_classes=100)
    assert count(peers) == 332_580
    assert count(peers) + count(nn.Linear(sum(peers.feature_dims), 100)) == 372_280


@pytest.mark.parametrize("name", KINDS)
def test_branches_are_distinct_and_the_trunk_is_one(name):
    peers = branches(name, 3, num_classes=5)
    bodies = [peers.member(p).body for p in range(3)]
    fork = MODELS[name](num_classes=5).branch_at
    for a, b in ((0, 1), (0, 2), (1, 2)):
        branch_a, branch_b = bodies[a].get_submodule(fork), bodies[b].get_submodule(fork)
        assert branch_a is not branch_b
        assert not set(branch_a.modules()) & set(branch_b.modules())
        assert not {p.data_ptr() for p in branch_a.parameters()} & {p.data_ptr() for p in branch_b.parameters()}
        assert not set(peers.member(a).head.modules()) & set(peers.member(b).head.modules())
        assert not all(torch.equal(x, y) for x, y in zip(branch_a.parameters(), branch_b.parameters()))
    top = [child for child, _ in bodies[0].named_children()]
    for child in top[: top.index(fork)]:
        assert all(isinstance(body.get_submodule(child), SharedModule) for body in bodies)
        assert all(body.get_submodule(child) is bodies[0].get_submodule(child) for body in bodies)


@pytest.mark.parametrize("name", KINDS)
def test_trunk_runs_once_for_all_branches(name):
    peers = branches(name, 3, num_classes=5)
    shared = next(m for m in peers.modules() if isinstance(m, SharedModule))
    calls = []
    shared.inner.register_forward_hook(lambda *_: calls.append(1))
    peers(images())
    assert len(calls) == 1
    peers(images(views=3))
    assert len(calls) == 4


@pytest.mark.parametrize("name", KINDS)
def test_branches_equal_their_exports(name):
    peers = branches(name, num_classes=5, in_channels=1).double().eval()
    x = images(1).double()
    with torch.no_grad():
        outputs = peers(x)
        for p in range(2):
            member, exported = peers.member(p), peers.export_member(p).eval()
            body = exported.forward_features(x)
            torch.testing.assert_close(outputs.features[p], body, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(outputs.logits_PBC[p], exported(x), rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(outputs.logits_PBC[p], member.head(member.body(x)), rtol=1e-9, atol=1e-15)
            assert count(exported) == count(MODELS[name](num_classes=5, in_channels=1))
            MODELS[name](num_classes=5, in_channels=1).load_state_dict(exported.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_branches_equal_those_of_plain_networks(name):
    # An operation in place on the trunk's output would show here: the second branch would see what the first one did.
    peers = branches(name, num_classes=5).double().eval()
    plain = [peers.export_member(p).eval() for p in range(2)]
    x = images(size=16).double()
    peers(x).logits_PBC.square().sum().backward()
    for network in plain:
        network(x).square().sum().backward()
    first = next(p for p in peers.parameters())
    expected = next(plain[0].parameters()).grad + next(plain[1].parameters()).grad
    scale = expected.abs().max()  # tiny for VGG, whose classifier starts near zero
    assert scale > 0
    torch.testing.assert_close(first.grad / scale, expected / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_a_training_step_on_the_smallest_images(name):
    peers = branches(name, num_classes=5, in_channels=1).train()
    logits = peers(images(1)).logits_PBC
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in peers.parameters())
