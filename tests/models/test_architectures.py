"""Networks of timm and torchvision as branches: equal to explicit copies; every method takes two steps."""

import pytest
import torch

from architectures import ARCHITECTURES, ROTATION, prove, two_steps
from codistill.config.methods import METHODS
from codistill.models import resolve
from codistill.peers.branch_points import branch_points, default_branch_point
from codistill.peers.branches import BranchPeers
from codistill.peers.inputs import dummy_input
from codistill.peers.networks import NetworkPeers
from codistill.peers.split_head import split_head

CASES = [(name, size) for _, name, size in ARCHITECTURES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), CASES, ids=[name.split(",")[0] for name, _ in CASES])
def test_branches_equal_explicit_copies(name, size):
    proof = prove(name, size)
    assert proof.outputs <= 1e-10
    assert proof.gradients <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=[name.split(",")[0] for name, _ in CASES])
def test_two_steps_run_under_a_method(index, tmp_path):
    method, topology = ROTATION[index % len(ROTATION)]
    losses = two_steps(*CASES[index], method, topology, tmp_path)
    assert len(losses) == 2


def test_the_rotation_covers_methods_and_architectures():
    expected = {name for name, config in METHODS.items() if config.topologies != ("twins",)}  # most cases draw nothing
    assert {method for method, _ in ROTATION[: len(CASES)]} == expected
    assert len({name.partition(",")[0] for name, _ in CASES}) >= 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "place"),
    [
        ("timm:resnet10t", 224, "layer4"),
        ("timm:mobilenetv3_small_050", 224, "blocks.4"),
        ("timm:convnext_atto,depths=(1,1,1,1)", 224, "stages.3"),
        ("torchvision:mobilenet_v2,width_mult=0.5", 224, "features.14"),
        ("torchvision:regnet_y_400mf", 224, "trunk_output.block4"),
        ("timm:vit_tiny_patch16_224,depth=4,embed_dim=48", 64, "blocks.3"),
        ("timm:vit_tiny_patch16_224,depth=12,embed_dim=48", 64, "blocks.9"),
    ],
)
def test_default_forks_at_last_stage_or_three_quarters(name, size, place):
    model = resolve(name)(num_classes=5, in_channels=3, image_size=size)
    member = split_head(model, dummy_input(model, 3, size))
    points = branch_points(member.body, member.head_path, dummy_input(model, 3, size))
    assert default_branch_point(points) == place
    paths = [point.path for point in points]
    assert len(paths) == len(set(paths))
    sizes = [point.branch_parameters for point in points]
    assert sizes == sorted(sizes, reverse=True)


def test_the_default_fork_does_not_depend_on_the_image_size():
    forks = []
    for size in (16, 64):
        peers = BranchPeers("timm:resnet10t", 2, 5, image_size=size)
        forks.append(peers.member(0).body.layer4.fan_out)
    assert forks == [2, 2]


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("torchvision:squeezenet1_1", "classifier", 512),
        ("timm:deit_tiny_distilled_patch16_224,depth=2,embed_dim=48", "head", 96),
    ],
)
def test_heads_of_other_kinds_are_cut_and_put_back(name, head, size):
    peers = NetworkPeers(name, 2, 5, image_size=64).eval()
    assert peers.member(0).head_path == head
    assert peers.feature_dims == [size] * 2
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    student = peers.export_member(1)
    assert student.state_dict().keys() == resolve(name)(num_classes=5, image_size=64).state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(peers(images).logits_PBC[1], student(images), rtol=1e-5, atol=1e-6)


def test_the_gate_of_one_reads_channels_last_feature_maps():
    name = "timm:swin_tiny_patch4_window7_224,depths=(1,1,1,1),embed_dim=24,num_heads=(1,2,4,8)"
    peers = BranchPeers(name, 2, 5, image_size=64)
    assert peers.trunk_dim == 96
    assert peers(torch.randn(2, 3, 64, 64)).trunk_BD.shape == (2, 96)
