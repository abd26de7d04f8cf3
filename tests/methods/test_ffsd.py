"""FFSD: the authors' numbers, its losses, what learns from what, and the decoders' Adam."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import codistill as cd
from codistill.config import FFSDConfig
from codistill.methods import FFSD
from codistill.methods.contrib.feature_maps import (
    Decoder,
    attention_distance,
    attention_map,
    diversity_distance,
    normalized_distance,
    shift_maps,
)
from codistill.methods.training_step import TrainingStep
from codistill.peers import NetworkPeers, PeerOutputs
from codistill.peers.maps import find_maps
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.utils import InputError
from helpers import oracles
from helpers.common import GOLDEN, close
from helpers.runs import StopAt, tiny

SHAPES = [(2, 8, 8), (3, 4, 4), (4, 2, 2)]


def authors(*names):
    with np.load(GOLDEN.parent / "next.npz") as archive:
        return [torch.tensor(archive[f"ffsd_{name}"]) for name in names]


def random_maps(num_peers=3, batch=2, classes=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    maps = [
        [torch.randn(batch, *shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in SHAPES]
        for _ in range(num_peers)
    ]
    z = 2 * torch.randn(num_peers, batch, classes, generator=rng, dtype=torch.float64)
    return z.requires_grad_(), maps, torch.randint(classes, (batch,), generator=rng)


def method_of(num_peers=3, classes=5, **options):
    torch.manual_seed(1)
    return FFSD(num_peers, [SHAPES] * num_peers, classes, **options).double()


def test_the_authors_distance_of_attention_and_its_gradient():
    x, y, loss, gradient = authors("x", "y", "attention", "grad_attention")
    x.requires_grad_()
    ours = attention_distance(x, y)
    close(ours, loss)
    close(torch.autograd.grad(ours, x)[0], gradient)


def test_the_authors_diversity_and_shifted_maps():
    x, y, loss, shifted = authors("x", "y", "diversity", "diversity_target")
    close(diversity_distance(x, y), loss)
    close(shift_maps(y), shifted)


@pytest.mark.parametrize("num_peers", [3, 4])
def test_losses_and_gradients_equal_the_loop(num_peers):
    z, maps, y = random_maps(num_peers)
    options = {"temperature": 2.5, "weight": 0.5, "diversity_weight": 0.3, "fusion_weight": 0.7}
    method = method_of(num_peers, **options)
    twin = copy.deepcopy(method)
    loss = method(PeerOutputs(z, [], maps=maps), y, weight=0.6)["loss"]
    naive = oracles.ffsd(z, maps, twin, y, temperature=2.5, kl_weight=0.5, a=0.18, b=0.42)
    close(loss, naive)
    inputs = [z, *(m for own in maps for m in own)]
    ours = torch.autograd.grad(loss, [*inputs, *trained(method)], allow_unused=True)
    theirs = torch.autograd.grad(naive, [*inputs, *trained(twin)], allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)


def trained(method):
    return [p for p in method.parameters() if p.requires_grad]


def test_the_first_student_has_no_terms_of_maps():
    z, maps, y = random_maps()
    loss = method_of(diversity_weight=1.0)(PeerOutputs(z, [], maps=maps), y)["loss"]
    gradients = torch.autograd.grad(loss, [m for own in maps for m in own], allow_unused=True)
    assert [g is None for g in gradients] == [True] * 3 + [False] * 6


def test_the_decoders_loss_and_adam_are_torchs():
    z, maps, y = random_maps()
    method, twin = method_of(decoder_lr=0.01), method_of(decoder_lr=0.01)
    decoders = twin.decoders.requires_grad_(True)
    adam = torch.optim.Adam(decoders.parameters(), lr=0.01)
    for number in range(3):
        method(PeerOutputs(z, [], maps=maps), y, weight=0.5)
        method.after_step(nn.Module(), TrainingStep(number, 0, ends_epoch=False, good=torch.tensor(True)))
        losses = []
        for decoder, own in zip(decoders, maps[1:]):
            for made, target in zip(decoder(own[-1].detach()), (own[1].detach(), own[0].detach())):
                losses.append(oracles.maps_distance(made, target, of_attention=False))
                losses.append(oracles.maps_distance(made, target))
        adam.zero_grad()
        (0.5 * 1000.0 * sum(losses)).backward()
        adam.step()
        for name, value in twin.decoders.state_dict().items():  # running statistics too
            close(method.decoders.state_dict()[name].double(), value.double(), 1e-9)


def test_a_refused_step_leaves_the_decoders_alone():
    z, maps, y = random_maps()
    method = method_of()
    method(PeerOutputs(z, [], maps=maps), y)
    before = {name: value.clone() for name, value in method.named_parameters()}
    method.gradient_0.fill_(float("nan"))
    method.after_step(nn.Module(), TrainingStep(0, 0, ends_epoch=False, good=torch.tensor(False)))
    assert all(torch.equal(value, before[name]) for name, value in method.named_parameters())
    assert method.decoder_steps == 0
    assert not method.mean_0.any()


def test_the_ramp_counts_epochs_from_1():
    method = method_of()
    assert [method.weight_at(e) for e in (0, 1, 4, 9)] == pytest.approx(
        [np.exp(-5 * 0.8**2), np.exp(-5 * 0.6**2), 1, 1]
    )
    assert tiny(method="ffsd", epochs=30).resolved().method.ramp_epochs == pytest.approx(0.5)


def test_without_feature_terms_maps_count_for_the_fused_classifier_alone():
    z, maps, y = random_maps()
    last = [[own[-1]] for own in maps]
    method = FFSD(3, [SHAPES[-1:]] * 3, 5, feature_terms=False).double()
    terms = method(PeerOutputs(z, [], maps=last), y, weight=0.0)
    _, u = method.fusion(torch.cat([own[-1] for own in last[:2]], 1))
    expected = oracles.ce(u, y) + oracles.kl(u, z[:2].mean(0).detach(), 2.0)
    for i, j in ((0, 1), (1, 0)):
        expected = expected + oracles.ce(z[i], y) + oracles.kl(z[i], z[j].detach(), 2.0)
    close(terms["loss"], expected + oracles.ce(z[2], y) + oracles.kl(z[2], u.detach(), 2.0))
    assert all(g is None for g in torch.autograd.grad(terms["loss"], [m[0] for m in last], allow_unused=True))


@pytest.mark.parametrize("num_peers", [2, 3])
def test_without_a_leader_all_learn_from_the_fused_classifier(num_peers):
    z, maps, y = random_maps(num_peers)
    last = [[own[-1]] for own in maps]
    options = {"feature_terms": False, "leader": False, "temperature": 3.0, "weight": 0.5}
    method = FFSD(num_peers, [SHAPES[-1:]] * num_peers, 5, **options).double()
    twin = copy.deepcopy(method)
    loss = method(PeerOutputs(z, [], maps=last), y, weight=0.4)["loss"]
    _, u = twin.fusion(torch.cat([own[-1] for own in last], 1))
    naive = oracles.ce(u, y) + 0.2 * oracles.kl(u, z.mean(0).detach(), 3.0)
    for own in z:
        naive = naive + oracles.ce(own, y) + 0.2 * oracles.kl(own, u.detach(), 3.0)
    close(loss, naive)
    inputs = [z, *(m for own in last for m in own)]  # the fused classifier trains the students' maps too
    ours = torch.autograd.grad(loss, [*inputs, *method.parameters()])
    for one, other in zip(ours, torch.autograd.grad(naive, [*inputs, *twin.parameters()]), strict=True):
        close(one, other)
    assert (method.deployed, method.group) == (0, tuple(range(num_peers)))
    assert [method.weight_at(e) for e in (0, 40, 80)] == pytest.approx([np.exp(-5), np.exp(-1.25), 1])


@pytest.mark.parametrize(
    ("name", "size", "paths"),
    [
        ("resnet32", 32, ["layer1", "layer2", "layer3"]),
        ("wrn16_2", 32, ["layer1", "layer2", "bn"]),
        ("torchvision:resnet18", 64, ["layer2", "layer3", "layer4"]),
        ("torchvision:vgg11_bn", 64, ["features.20", "features.27", "features"]),
        ("torchvision:densenet121", 64, ["features.denseblock2", "features.denseblock3", "features"]),
        ("timm:test_efficientnet", 64, ["blocks.2", "blocks.3", "bn2"]),
    ],
)
def test_the_maps_are_those_of_the_last_stages(name, size, paths):
    torch.manual_seed(0)
    member = NetworkPeers(name, 1, 10, image_size=size).member(0)
    found = find_maps(member.body, torch.zeros(1, 3, size, size), 3)
    assert list(found) == paths
    assert [shape[1] for shape in found.values()] == sorted({shape[1] for shape in found.values()}, reverse=True)


def test_the_last_map_is_what_is_pooled():
    peers = NetworkPeers("resnet8", 2, 10, image_size=32, maps=3).train()
    outputs = peers(torch.randn(4, 3, 32, 32))
    assert [m.shape[1:] for m in outputs.maps[1]] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    close(outputs.maps[1][-1].mean((2, 3)), outputs.features[1], 1e-6)
    assert not peers.eval()(torch.randn(4, 3, 32, 32)).exits
    with torch.no_grad():
        assert not peers(torch.randn(4, 3, 32, 32)).maps
    assert not any(module._forward_hooks for module in peers.modules())


def test_networks_without_suitable_maps_are_refused():
    with pytest.raises(InputError, match="VisionTransformer gives maps of 1 sizes, not 3"):
        NetworkPeers("timm:test_vit", 3, 10, image_size=160, maps=3)
    with pytest.raises(InputError, match="the last maps of ResNet are single pixels; give a larger --image-size"):
        NetworkPeers("torchvision:resnet18", 3, 10, image_size=32, maps=1)
    with pytest.raises(InputError, match="ffsd reads 3 maps of each of 3 networks"):
        FFSD(3, [()] * 3, 10)
    with pytest.raises(InputError, match="take networks whose maps have one shape"):
        FFSD(3, [SHAPES, SHAPES, [*SHAPES[:2], (8, 2, 2)]], 10)
    with pytest.raises(InputError, match="these go from 8 x 8 to 2 x 2"):
        FFSD(3, [[SHAPES[0], SHAPES[2], (4, 1, 1)]] * 3, 10)
    for words, sentence in (
        ({"mesh": "data=3"}, "drop --mesh"),
        ({"checkpoint_activations": True}, "ffsd keeps its maps; drop one of the two"),
        ({"topology": "branches"}, "ffsd"),
        ({"peers": 2}, "--peers is 2; ffsd needs at least 3: two students and the leader"),
        ({"method": FFSDConfig(leader=False)}, "add --method.no-feature-terms"),
    ):
        with pytest.raises(InputError, match=sentence):
            tiny(**{"method": "ffsd"} | words).resolved()
    for words, sentence in (
        ({"accumulate": 2}, "--accumulate: ffsd needs the full batch"),
        ({"sam_rho": 0.05}, "--sam-rho: ffsd keeps what it computes of a batch"),
        ({"execution": "stacked"}, "reads maps inside the networks"),
    ):
        with pytest.raises(InputError, match=sentence):
            build_run(tiny(method="ffsd", **words).resolved())


def test_a_resumed_run_continues_the_decoders(tmp_path):
    options = {"method": FFSDConfig(), "epochs": 2, "batch_size": 20}
    whole = train(tiny(**options, out=str(tmp_path / "whole"), checkpoint_every_steps=1, log_every_steps=1))
    stopped = {**options, "out": str(tmp_path / "stopped"), "checkpoint_every_steps": 1, "log_every_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        train(tiny(**stopped), StopAt(1, 1))
    again = train(tiny(**stopped, resume="auto"))
    ours, theirs = checkpoint_state(again.training), checkpoint_state(whole.training)
    for part in ("peers", "method"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(value, ours[part][key]) for key, value in theirs[part].items())
    assert theirs["method"]["decoder_steps"] == 6
    assert whole.figures["deployed"] == "member 2"
    plain = cd.NetworkPeers("resnet8", 1, 10, in_channels=1, image_size=8).export_member(0)
    assert again.student.state_dict().keys() == plain.state_dict().keys()


def test_the_leader_learns_nothing_into_the_students():
    t = build_run(tiny(method="ffsd", dtype="float64").resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    outputs = t.peers(next(t.loader.epoch(0))[0])
    y = next(t.loader.epoch(0))[1]
    loss_P = t.method(outputs, y)["loss_P"]
    students = [p for i in (0, 1) for p in t.peers.member(i).parameters()]
    gradients = torch.autograd.grad(loss_P[2], students, retain_graph=True, allow_unused=True)
    assert not any(g is not None and g.any() for g in gradients)
    terms = train_step(t, *next(t.loader.epoch(0)), 1.0)
    assert terms["loss"].isfinite()
    close(normalized_distance(attention_map(outputs.maps[0][0]), attention_map(outputs.maps[0][0])), torch.zeros(()))


def slow_norm(x, norm, training=True):
    """BatchNorm with the statistics of the batch, or the running ones."""
    axes = (0, 2, 3)
    mean, var = (x.mean(axes), x.var(axes, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    scaled = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    return scaled * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def slow_mixer(x, mixer):
    """Depthwise 3 x 3, norm, ReLU, 1 x 1, norm, ReLU, position by position."""
    depthwise, first, _, pointwise, second, _ = mixer
    height, width = x.shape[2:]
    padded, y = nn.functional.pad(x, (1, 1, 1, 1)), torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            window = padded[:, :, row : row + 3, column : column + 3]
            y[:, :, row, column] = (window * depthwise.weight[:, 0]).sum((2, 3))
    y = slow_norm(y, first).clamp_min(0)
    return slow_norm(torch.einsum("oc,bchw->bohw", pointwise.weight[:, :, 0, 0], y), second).clamp_min(0)


def slow_upsampling(x, weight, height, width):
    """The transposed convolution 3 x 3 of stride 2 and padding 1: every number adds a patch to the output."""
    h, w = x.shape[2:]
    y = x.new_zeros(len(x), weight.shape[1], height + 3, width + 3)  # with a border that is cut off
    for row in range(h):
        for column in range(w):
            patch = torch.einsum("bc,cohw->bohw", x[:, :, row, column], weight)
            y[:, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] += patch
    return y[:, :, 1 : height + 1, 1 : width + 1]


@torch.no_grad()
def test_fusion_and_leaders_mixer_equal_the_slow_ones():
    method, x = method_of(), torch.randn(6, 8, 4, 5, dtype=torch.float64)
    fused, logits = method.fusion(x)
    expected = slow_mixer(x, method.fusion.mixer)
    close(fused, expected)
    head = method.fusion.head
    close(logits, expected.sum((2, 3)) / 20 @ head.weight.T + head.bias)
    close(method.leader_mixer(x[:, :4]), slow_mixer(x[:, :4], method.leader_mixer))


@torch.no_grad()
@pytest.mark.parametrize("shapes", [SHAPES, [(2, 7, 5), (3, 4, 3), (4, 2, 2)]])
@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_equals_the_slow_one(shapes, training):
    torch.manual_seed(2)
    decoder, x = Decoder(shapes).double(), torch.randn(6, *shapes[-1], dtype=torch.float64)
    for norm in decoder.norms:
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    made, y = copy.deepcopy(decoder).train(training)(x), x
    assert len(made) == 2
    for ours, upsampler, norm, (_, height, width) in zip(made, decoder.upsamplers, decoder.norms, shapes[1::-1]):
        y = slow_norm(slow_upsampling(y, upsampler.weight, height, width), norm, training).clamp_min(0)
        close(ours, y)
