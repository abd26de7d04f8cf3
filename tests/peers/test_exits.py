"""Exits against networks whose later stages are copied by hand, in float64; and the networks that can have them."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from codistill.config import MethodConfig
from codistill.methods import Method, PeerInfo, combine_terms
from codistill.peers import BranchPeers, NetworkPeers, PeerOutputs
from codistill.training import train
from codistill.utils import InputError, count_parameters
from helpers.runs import tiny


def peers_with(count, model="resnet8", **options):
    return NetworkPeers(model, 2, 10, image_size=8, exits=count, **options)


def plain_part(module):
    """A copy of the modules inside an exit or a member, without the wrappers."""
    from codistill.peers.shared_trunk import plain_copy

    return plain_copy(module)


def slow_exits(body, exits, x):
    """Features of a ResNet's exits and its own, from copies of its stages."""
    stem = body.layer1(body.relu(body.bn1(body.conv1(x))))
    second = body.layer2(stem)
    third = body.layer3(second)
    maps = [exits[0].layer3(exits[0].layer2(stem)), exits[1].layer3(second), exits[2].layer3[1](third)]
    return third.mean((2, 3)), [y.mean((2, 3)) for y in maps]


def test_exits_equal_stages_that_are_copied_by_hand():
    peers = peers_with(3).double()
    plains = [(plain_part(m.body), m.head, [plain_part(e) for e in m.exits]) for m in copy.deepcopy(peers).members]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        outputs = peers(x + step)
        loss = outputs.logits_PBC.square().sum() + sum(y.exp().sum() for own in outputs.exits for y in own)
        loss.backward()
        naive = torch.zeros((), dtype=torch.float64)
        for p, (body, head, exits) in enumerate(plains):
            features, slow = slow_exits(body, exits, x + step)
            torch.testing.assert_close(outputs.features[p], features, rtol=1e-10, atol=1e-10)
            for ours, theirs in zip(outputs.exits[p], slow, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
            naive = naive + head(features).square().sum() + sum(y.exp().sum() for y in slow)
        naive.backward()
    for member, (body, _, exits) in zip(peers.members, plains):
        ours, theirs = dict(plain_part(member.body).state_dict()), body.state_dict()
        assert all(torch.allclose(value, theirs[key], rtol=1e-10) for key, value in ours.items())
        assert int(ours["bn1.num_batches_tracked"]) == 2  # the shared part runs once a step
        shared = {n.replace(".inner", ""): q.grad for n, q in member.body.named_parameters()}
        for name, parameter in body.named_parameters():
            torch.testing.assert_close(shared[name], parameter.grad, rtol=1e-10, atol=1e-10)
        for e, network in enumerate(exits):
            grads = {n.replace(".inner", ""): q.grad for n, q in member.exits[e].named_parameters()}
            for name, parameter in network.named_parameters():
                if name.startswith((("layer2", "layer3"), ("layer3",), ("layer3.1",))[e]):
                    torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_the_sources_resnet_has_its_parameters():
    peers = NetworkPeers("resnet32", 1, 100, exits=3)
    assert count_parameters(peers.member(0)) + 3 * (64 * 400 + 400) == 1_716_772
    assert count_parameters(peers.export_member(0)) == 472_756
    stage = peers.member(0).exits[2].layer3[1]
    assert len(stage) == 5
    assert all(block.conv1.stride == (1, 1) and isinstance(block.shortcut, nn.Identity) for block in stage)
    weight = stage[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("model", ["resnet8", "wrn16_2", "vgg16", "densenet40_12"])
def test_the_network_itself_is_as_without_exits(model):
    with_exits = peers_with(2, model)
    plain = NetworkPeers(model, 2, 10, image_size=8)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(with_exits.eval()(x).logits_PBC, plain.eval()(x).logits_PBC)
    ours, theirs = with_exits.export_member(1).state_dict(), plain.export_member(1).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first, second = with_exits.member(0).exits
    assert with_exits.exit_dims == [(d, d) for d in plain.feature_dims]
    own = [{id(q) for q in m.parameters()} for m in (with_exits.member(0).body, first, second, with_exits.member(1))]
    assert min(len(own[1] - own[0]), len(own[2] - own[0])) > 0
    assert not (own[1] - own[0]) & own[2]
    assert not own[0] & own[3]


@pytest.mark.parametrize(
    ("model", "size", "first"),
    [
        ("torchvision:resnet18", 32, ["layer2", "layer3", "layer4"]),
        ("timm:convnext_atto", 32, ["stages.1", "stages.2", "stages.3"]),
        ("timm:test_vit", 160, ["blocks.2", "blocks.3", "blocks.5"]),
    ],
)
def test_networks_of_libraries_have_exits_where_their_maps_shrink(model, size, first):
    from codistill.models import resolve
    from codistill.peers.exits import find_exit_forks
    from codistill.peers.inputs import dummy_input

    peers = NetworkPeers(model, 1, 10, image_size=size)
    count = len(first)
    forks, after = find_exit_forks(peers.member(0), resolve(model), count, dummy_input(peers.member(0), 3, size))
    assert (forks, after) == (first, [False] * count)
    outputs = NetworkPeers(model, 1, 10, image_size=size, exits=count)(torch.randn(2, 3, size, size))
    assert [x.shape[0] for x in outputs.exits[0]] == [2] * count


def test_evaluation_leaves_the_exits_out_and_nothing_is_kept():
    peers = peers_with(2)
    x = torch.randn(2, 3, 8, 8)
    outputs = peers(x)
    assert all(not shared.cached_tensors() for m in peers.members for shared in m.shared_modules)
    assert len(outputs.exits) == 2
    with torch.no_grad():
        assert not peers.eval()(x).exits
        assert torch.equal(peers.member(0)(x)[1], peers(x).logits_PBC[0])
        assert not torch.equal(peers.member(0)(x)[1], peers.member(0)(x + 1)[1])
        assert len(peers.train()(x).exits) == 2


def test_what_has_no_exits_is_refused():
    with pytest.raises(InputError, match="DenseNet has 2 places for exits, not 3"):
        peers_with(3, "densenet40_12")
    with pytest.raises(InputError, match="Tiny has 0 places for exits, not 1"):
        NetworkPeers("tiny_network:Tiny", 2, 10, in_channels=1, image_size=8, exits=1)
    with pytest.raises(InputError, match="a built model cannot have them"):
        NetworkPeers([NetworkPeers("resnet8", 1, 10).export_member(0)], 1, 10, exits=1)


class Deep(Method):
    """Cross-entropy of the network and of two exits, each with a classifier of its own."""

    name = "deep"
    citation = "none"

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        """No options."""

        def num_exits(self):
            """Return two."""
            return 2

    def __init__(self, num_peers, widths, num_classes):
        super().__init__(num_peers)
        self.needs = frozenset({"exits"})
        self.heads = nn.ModuleList(nn.Linear(d, num_classes) for own in widths for d in own)

    @classmethod
    def build(cls, config, info: PeerInfo):
        """Build the classifiers for the widths of the exits."""
        return cls(info.num_peers, info.exit_dims, info.num_classes)

    def forward(self, outputs: PeerOutputs, targets_B, weight=1.0):
        """Return the terms."""
        self.check(outputs)
        logits = torch.stack([h(x) for h, x in zip(self.heads, (x for own in outputs.exits for x in own))])
        ce = nn.functional.cross_entropy
        ce_P = torch.stack([ce(z, targets_B) for z in outputs.logits_PBC])
        deep = torch.stack([ce(z, targets_B) for z in logits]).view(self.num_peers, -1).sum(-1)
        return combine_terms(ce_P, deep, weight)


def test_a_method_gets_its_exits_and_deploys_the_plain_network(tmp_path):
    options = {"method": Deep.Config(), "peers": 2, "epochs": 1}
    result = train(tiny(**options, out=str(tmp_path / "run")))
    plain = NetworkPeers("resnet8", 1, 10, in_channels=1, image_size=8).export_member(0)
    assert list(result.student.state_dict()) == list(plain.state_dict())
    assert result.figures["parameters_deployed"] == count_parameters(plain)
    both = result.peers.num_peers * count_parameters(plain)
    exits = count_parameters(result.peers) - both
    assert exits > 0
    assert result.figures["parameters_trained"] == both + exits + 4 * (64 * 10 + 10)
    assert result.figures["cost"]["training_flops_a_sample"] > 3 * 2 * result.figures["cost"]["flops_an_image"]
    ensemble = result.training.method.deploy_ensemble(result.peers)
    assert count_parameters(ensemble.peers) == both
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ensemble.eval().peers(x).logits_PBC, result.peers.eval()(x).logits_PBC)
    plain_peers = NetworkPeers("resnet8", 2, 10, in_channels=1, image_size=8)
    with pytest.raises(InputError, match="build NetworkPeers with exits=E"):
        result.training.method(plain_peers(x), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology": "branches"}, "branches have none; drop --topology branches"),
        ({"checkpoint_activations": True}, "the exits of deep share its maps; drop one of the two"),
        ({"execution": "stacked"}, "the exits of deep run beside the networks"),
    ],
)
def test_what_exits_cannot_be_combined_with_is_said(options, words):
    from codistill.training.build import build_run

    with pytest.raises(InputError, match=words):
        build_run(tiny(method=Deep.Config(), peers=2, **options).resolved())


def test_branches_have_no_exits():
    assert not any(BranchPeers("resnet8", 2, 10, image_size=8).exit_dims)
