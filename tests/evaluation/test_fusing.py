"""Networks with fused kernels say what they said, whatever else reads the maps that are written over."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from codistill.data import DeviceLoader
from codistill.evaluation import fold_batchnorm as folding
from codistill.evaluation.evaluate import folded_members
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.evaluation.fused_conv import FusedConv, fuse
from codistill.peers.branches import BranchPeers
from codistill.peers.networks import NetworkPeers


def trained(kind, model, **options):
    """Return peers whose running statistics matter."""
    peers = kind(model, 2, 10, image_size=16, **options)
    peers.train()
    with torch.no_grad():
        peers(torch.randn(8, 3, 16, 16) * 2 + 1)
    return peers.eval()


def number_fused(module):
    return sum(isinstance(m, FusedConv) for m in module.modules())


@torch.no_grad()
def largest_gap(one, other, x):
    said = other(x).logits_PBC
    return ((one(x).logits_PBC - said).abs().max() / said.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NetworkPeers, BranchPeers])
@pytest.mark.parametrize(
    ("model", "networks", "branches"),
    [
        ("resnet8", 14, 7),
        ("resnet110", 218, 144),
        ("wrn16_2", 14, 8),
        ("vgg16", 26, 16),
        ("densenet40_12", 36, 24),
        ("torchvision:resnet18", 34, 18),
        ("torchvision:mobilenet_v2", 0, 0),
    ],
)
def test_fused_peers_say_the_same(kind, model, networks, branches):
    peers = trained(kind, model)
    state = {k: v.clone() for k, v in peers.state_dict().items()}
    x = torch.randn(5, 3, 16, 16)
    held = x.clone()
    fused = folded_for_evaluation(peers, x[:2], large=True)
    assert largest_gap(fused, peers, x) < 1e-5
    assert torch.equal(x, held)
    assert all(torch.equal(v, state[k]) for k, v in peers.state_dict().items())
    assert number_fused(fused) == (networks if kind is NetworkPeers else branches)


class Block(nn.Module):
    """Two convolutions and a norm; what is made of them is up to a subclass."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.maps(F.relu(self.norm(self.first(x)))).mean((2, 3)))


class Residual(Block):
    def maps(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + x)


class ReadLater(Block):
    def maps(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + x) * x


class ReadByALaterConvolution(Block):
    def maps(self, x):
        y = F.relu(self.two(F.relu(self.one(x))) + x)
        return self.same(x) + y


class ReadByAConvolutionThatMoves(Block):
    def maps(self, x):
        late = self.three(x)  # fused with the last addition, and so run there
        y = F.relu(self.two(F.relu(self.one(x))) + x)
        return F.relu(late + y)


class ItsOwnInput(Block):
    def maps(self, x):
        return F.relu(self.one(x) + x)


class ReadThroughAView(Block):
    def maps(self, x):
        seen = x.flatten(2)
        return F.relu(self.two(F.relu(self.one(x))) + x) + seen.unflatten(2, (16, 16))


class UsedTwice(Block):
    def maps(self, x):
        y = self.one(x)
        return F.relu(y) - y


class Doubled(Block):
    def maps(self, x):
        return F.relu(torch.add(self.one(x), x, alpha=2))


class OtherPaddings(Block):
    def maps(self, x):
        return F.relu(self.same(F.relu(self.circular(x))))


class Branching(Block):
    def maps(self, x):
        return F.relu(self.one(x)) if x.mean() > 0 else x


class Written(Block):
    def maps(self, x):
        y = self.one(x)
        y += x
        return torch.relu(self.two(nn.functional.relu_(y)))


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (Residual, 3),
        (ReadLater, 0),
        (ReadByALaterConvolution, 0),
        (ReadByAConvolutionThatMoves, 0),
        (ItsOwnInput, 1),
        (ReadThroughAView, 0),
        (UsedTwice, 1),
        (Doubled, 1),
        (OtherPaddings, 1),
        (Branching, 0),
        (Written, 2),
    ],
)
def test_a_map_is_written_over_only_where_nobody_reads_it_later(network, count):
    peers = trained(NetworkPeers, network)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        folded = folded_for_evaluation(peers, x[:2])
        expected = peers.member(0)(x)[1]
        body = fuse(folded.member(0).body)
        assert number_fused(body) == count
        got = peers.member(0).head(body(x))
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert largest_gap(folded_for_evaluation(peers, x[:2], large=True), peers, x) < 1e-5


class AddedToAll(Block):
    def maps(self, x):
        return F.relu(self.one(x) + self.two(F.adaptive_avg_pool2d(x, 1)))


class SpreadOverAll(Block):
    def maps(self, x):
        return F.relu(self.one(F.adaptive_avg_pool2d(x, 1)) + self.two(x))


@pytest.mark.parametrize("network", [AddedToAll, SpreadOverAll])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_of_two_sizes_are_not_written_over_each_other(network, layout):
    peers = trained(NetworkPeers, network).to(memory_format=layout)
    x = torch.randn(5, 3, 16, 16).contiguous(memory_format=layout)
    assert largest_gap(folded_for_evaluation(peers, x[:2], large=True), peers, x) < 1e-5


def test_bfloat16_applies_to_weights_but_not_to_heads():
    peers = trained(NetworkPeers, "resnet8")
    peers.autocast = torch.bfloat16
    peers.to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fused = folded_for_evaluation(peers, x[:2], large=True)
    assert fused.autocast is torch.bfloat16
    assert largest_gap(fused, peers, x) < 0.05
    try:
        FusedConv(nn.Conv2d(3, 4, 3)).bfloat16()(x)
    except RuntimeError:  # this processor has no such kernel
        assert not number_fused(fused)
    else:
        assert number_fused(fused) == 14
        assert {m.weight.dtype for m in fused.modules() if isinstance(m, FusedConv)} == {torch.bfloat16}
    assert fused.member(0).head.weight.dtype is torch.float32


@pytest.mark.parametrize("failure", ["no kernel", "refused", "no such operator", "wrong"])
def test_the_folded_network_is_the_fallback_for_kernels(monkeypatch, failure):
    peers = trained(NetworkPeers, "resnet8")
    x = torch.randn(4, 3, 16, 16)
    if failure == "no kernel":
        monkeypatch.setattr(folding, "is_available", lambda x: False)
    elif failure == "no such operator":
        monkeypatch.setattr(FusedConv, "forward", lambda self, x, other=None: torch.ops.mkldnn.no_such_operator(x))
    elif failure == "refused":
        monkeypatch.setattr(FusedConv, "forward", lambda self, x, other=None: x @ x[0, 0, 0, :3])
    else:
        monkeypatch.setattr(
            FusedConv, "forward", lambda self, *xs: F.conv2d(xs[0], self.weight, None, *self.geometry[1::-1])
        )
    fused = folded_for_evaluation(peers, x[:2], large=True)
    assert not number_fused(fused)
    assert largest_gap(fused, peers, x) < 1e-5


@pytest.mark.parametrize(("count", "fused"), [(8191, False), (8192, True)])
def test_it_is_done_where_much_is_evaluated(count, fused):
    peers = trained(NetworkPeers, "resnet8")
    images = torch.zeros(count, 16, 16, 3, dtype=torch.uint8).numpy()
    loader = DeviceLoader(images, torch.zeros(count, dtype=torch.int64).numpy(), (0.5,) * 3, (0.5,) * 3, batch_size=32)
    assert bool(number_fused(folded_members(peers, loader))) is fused
