"""Stacked peers train as the loop does, are members all the while, and are refused where they cannot be had."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from codistill.config.config import Config
from codistill.methods import build_method
from codistill.peers import NetworkPeers, build_peers
from codistill.peers.stacked import StackedConv2d, StackedPeers
from codistill.training.build import build_run
from codistill.training.execution import choose_execution
from codistill.training.load import load_run
from codistill.training.loaders import evaluation_batch
from codistill.training.loop import train
from codistill.training.run import zero_sums
from codistill.training.state import checkpoint_state
from codistill.training.step import train_step
from codistill.training.student import deployed_network
from codistill.utils.errors import InputError
from helpers.common import close
from helpers.runs import StopAt, tiny


class Viewing(nn.Module):
    """Takes its maps apart by the strides that they have alone."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), 4, -1).mean(2))


CASES = [
    ("okddip", "networks"),
    ("okddip", "branches"),
    ("one", "branches"),
    ("cl_ilr", "branches"),
    ("pcl", "networks"),
    ("kdcl", "networks"),
]


def config(name="okddip", topology="networks", **options) -> Config:
    return tiny(**{"method": name, "topology": topology, "batch_size": 12, "epochs": 2} | options)


def build(*args, **options):
    t = build_run(config(*args, **options).resolved())
    t.progress.sums = zero_sums(t)
    t.peers.train()
    return t


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "topology"), CASES)
def test_stacked_trains_as_the_loop_does(name, topology, merged):
    """Also as on a GPU: groups of few channels merged, one copy of the images for all members."""
    loop = build(name, topology, dtype="float64", execution="loop")
    stacked = build(name, topology, dtype="float64", execution="stacked")
    if merged:
        for runner in [stacked.peers.stacked_runner, *([stacked.ema.peers.stacked_runner] if stacked.ema else [])]:
            runner.repeats_images = False
            for conv in runner.body.modules():
                if isinstance(conv, StackedConv2d):
                    conv.merges = True
    for step in range(4):
        for t in (loop, stacked):
            batch = list(t.loader.epoch(0))[step]
            t.progress.step = step
            train_step(t, *batch, 1.0)
    for part in ("peers", "method", "ema"):
        theirs = checkpoint_state(stacked)[part]
        for key, value in (checkpoint_state(loop)[part] or {}).items():
            close(theirs[key].double(), value.double(), 1e-10)
    close(stacked.progress.sums["loss"], loop.progress.sums["loss"], 1e-10)
    x = next(loop.loader.epoch(1))[0][0]
    close(deployed_network(stacked)(x), deployed_network(loop)(x), 1e-10)


@pytest.mark.parametrize("num_peers", [3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_merged_groups_are_the_grouped_convolution(num_peers, stride):
    """What a GPU runs instead of many narrow groups, here on the CPU: 16 channels merge 4 or 3 members, 32 merge 2."""
    members = [nn.Conv2d(channels, 24, 3, stride, 1, bias=False).double() for channels in (16, 32) for _ in range(4)]
    for first, groups in ((0, {3: 1, 4: 1}), (4, {3: 3, 4: 2})):
        own = members[first : first + num_peers]
        width = own[0].in_channels
        conv = StackedConv2d(num_peers * width, num_peers * 24, 3, stride, 1, groups=num_peers, bias=False).double()
        conv.num_peers, conv.merges = num_peers, True
        conv.weight.data = torch.cat([m.weight.detach() for m in own]).contiguous(memory_format=torch.channels_last)
        assert conv.num_merged_groups == groups[num_peers]
        for _ in range(2):  # the merged weight's memory is used again
            x = torch.randn(5, num_peers * width, 8, 8, dtype=torch.float64, requires_grad=True)
            parts = [part.detach().requires_grad_() for part in x.chunk(num_peers, 1)]
            expected = torch.cat([m(part) for m, part in zip(own, parts)], 1)
            slope = torch.randn_like(expected)
            conv.weight.grad = None
            ours = conv(x)
            ours.backward(slope)
            for m in own:
                m.weight.grad = None
            expected.backward(slope)
            close(ours, expected, 1e-13)
            close(x.grad, torch.cat([part.grad for part in parts], 1), 1e-13)
            close(conv.weight.grad, torch.cat([m.weight.grad for m in own]), 1e-13)
            with torch.no_grad():
                conv.weight.mul_(1.5)
                for m in own:
                    m.weight.mul_(1.5)


def test_members_that_see_one_image_convolve_it_once():
    conv = StackedConv2d(12, 32, 3, 1, 1, groups=4, bias=False)
    conv.num_peers = 4
    x = torch.randn(2, 3, 8, 8)
    close(conv(x), conv(torch.cat([x] * 4, 1)), 1e-5)


def test_members_are_views_and_go_round_without_loss():
    stacked, loop = build(execution="stacked"), build(execution="loop", seed=3)
    before = {k: v.clone() for k, v in loop.peers.state_dict().items()}
    stacked.peers.load_state_dict(before)
    after = stacked.peers.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    x = next(loop.loader.epoch(0))[0]
    with torch.no_grad():
        assert torch.allclose(stacked.peers(x).logits_PBC, loop.peers(x).logits_PBC, atol=1e-5)  # the stack sees it too
    assert sum(p.numel() for p in stacked.peers.parameters()) == sum(
        p.numel() for p in stacked.peers.trained_parameters()
    )


@pytest.mark.parametrize(("options", "sentence"), [
    ({"model": ("resnet8", "wrn16_2", "resnet8"), "name": "independent"}, "peers of the same architecture"),
    ({"model": "densenet40_12"}, "mixes channels"),
    ({"model": "vgg16"}, "heads of one Linear"),
    ({"name": "dml"}, "alternating updates"),
    ({"name": "pcl", "topology": "branches"}, "branches with a view each"),
    ({"name": "independent", "peers": 1}, "one peer cannot be stacked"),
    ({"name": "cl_ilr", "topology": "branches", "branch_at": ("layer2", "layer3"), "fan_out": (2, 2), "peers": 4},
     "fork once"),
])  # fmt: skip
def test_what_cannot_be_stacked_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        build(execution="stacked", **options)
    assert build(execution="measure", **options).execution == "loop"


def test_the_old_name_measure_means_auto(tmp_path):
    stacked = config(execution="stacked", out=str(tmp_path / "run"), epochs=2, log_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(stacked, StopAt(1, 2))
    again = train(dataclasses.replace(stacked, execution="measure", resume="auto"))
    assert again.figures["execution"] == "stacked"
    assert load_run(tmp_path / "run").execution == "stacked"
    assert build(execution="measure").execution == build(execution="auto").execution == "stacked"


@pytest.mark.parametrize(("options", "size", "execution"), [
    ({"batch_size": 128}, 8, "stacked"),
    ({"batch_size": 129}, 8, "loop"),
    ({"batch_size": 8}, 32, "stacked"),
    ({"batch_size": 9}, 32, "loop"),
    ({"batch_size": 256, "accumulate": 2}, 8, "stacked"),
    ({"dtype": "bfloat16"}, 8, "loop"),
    ({"checkpoint_activations": True, "name": "independent", "topology": "networks"}, 8, "loop"),
    ({"model": "tiny_network:Tiny", "name": "independent"}, 8, "loop"),
    ({"model": "densenet40_12"}, 8, "loop"),
    ({"model": "wrn20_8", "peers": 2, "name": "independent"}, 8, "loop"),
    ({"freeze": ("trunk",)}, 8, "loop"),
    ({"execution": "loop"}, 8, "loop"),
])  # fmt: skip
def test_auto_stacks_small_batches_of_small_images(options, size, execution):
    c = config(**options).resolved()
    peers = build_peers(c, 10, 1, size)
    method = build_method(c.method, peers, 0)
    before = {name: value.clone() for name, value in peers.state_dict().items()}
    chosen = choose_execution(c, peers, method, torch.device("cpu"), (1, size, size))
    assert chosen == execution
    assert choose_execution(c, peers, method, torch.device("meta"), (1, size, size)) == "loop"
    assert all(torch.equal(value, before[name]) for name, value in peers.state_dict().items())
    assert not any(value._is_view() for value in peers.parameters())  # the trial was made on a copy
    if c.execution == "auto":
        assert choose_execution(c, peers, method, torch.device("cpu"), (1, size, size), "loop") == "loop"


def test_a_run_continues_as_it_began(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config(execution="loop", out=str(tmp_path / "run"), log_every_steps=1), StopAt(1, 2))
    assert train(config(out=str(tmp_path / "run"), resume="auto", log_every_steps=1)).figures["execution"] == "loop"


@pytest.mark.parametrize(
    ("model", "execution"), [("resnet8", "stacked"), ("wrn16_2", "loop"), ("densenet40_12", "loop")]
)
def test_auto_stacks_networks_of_few_channels_on_a_gpu(model, execution):
    """wrn16_2 has 128 channels; densenet40_12 cannot be stacked."""
    t = build("independent", model=model, peers=2, execution="loop")
    c, device, image_CHW = dataclasses.replace(t.config, execution="auto"), torch.device("cuda"), (1, 8, 8)
    assert choose_execution(c, t.peers, t.method, device, image_CHW) == execution
    assert choose_execution(c, t.peers, t.method, device, image_CHW, saved="loop") == "loop"


def test_a_gpu_evaluates_more_small_images_at_once():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert evaluation_batch(128, 32, cuda) == 2048
    assert evaluation_batch(128, 224, cuda) == evaluation_batch(128, 32, cpu) == 256
    assert evaluation_batch(4096, 32, cuda) == 4096


def test_a_resumed_stacked_run_ends_bit_identical(tmp_path):
    options = {"execution": "stacked", "checkpoint_every_steps": 1, "log_every_steps": 1}
    whole = train(config(out=str(tmp_path / "whole"), **options))
    with pytest.raises(KeyboardInterrupt):
        train(config(out=str(tmp_path / "stopped"), **options), StopAt(1, 2))
    again = train(config(out=str(tmp_path / "stopped"), resume="auto", **options))
    for key, value in whole.peers.state_dict().items():
        assert torch.equal(value, again.peers.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "topology"), [("sgd", "networks"), ("sgd", "branches"), ("adamw", "networks")])
def test_a_checkpoint_does_not_show_how_the_peers_ran(tmp_path, optimizer, topology):
    options = {"optimizer": optimizer, "topology": topology, "dtype": "float64", "log_every_steps": 1}
    if optimizer == "adamw":
        options["lr"] = 1e-3
    whole = train(config(out=str(tmp_path / "whole"), execution="loop", **options))
    options |= {"out": str(tmp_path / "run"), "resume": "auto", "checkpoint_every_steps": 1}
    for epoch, execution in enumerate(["stacked", "loop"]):
        with pytest.raises(KeyboardInterrupt):
            train(config(execution=execution, **options), StopAt(epoch, 2))
    again = train(config(execution="stacked", **options))
    assert again.figures["execution"] == "stacked"
    for key, value in whole.peers.state_dict().items():
        close(again.peers.state_dict()[key].double(), value.double(), 1e-9)


def test_bfloat16_stacks_too():
    t = build(dtype="bfloat16", execution="stacked")
    terms = train_step(t, *next(t.loader.epoch(0)), 1.0)
    assert terms["loss"].dtype == torch.float32


@pytest.mark.parametrize("remake", ["spectral_norm", "pruning", "weight_norm"])
def test_weights_that_are_made_anew_are_not_stacked(remake):
    def network(num_classes=10):
        conv = nn.Conv2d(1, 4, 3)
        if remake == "pruning":
            prune.l1_unstructured(conv, "weight", 0.5)
        else:
            conv = getattr(nn.utils.parametrizations, remake)(conv)
        return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    peers = NetworkPeers(network, 2, 10, in_channels=1, image_size=8)
    with pytest.raises(InputError, match="--execution stacked: weight norm, spectral norm or pruning"):
        StackedPeers(peers, torch.randn(2, 1, 8, 8))


def test_a_network_that_fails_on_stacked_maps_is_refused():
    peers = NetworkPeers(Viewing, 2, 10, in_channels=1, image_size=8)
    images = torch.randn(2, 1, 8, 8).to(memory_format=torch.channels_last)
    peers.member(0)(images.contiguous())  # alone it works
    with pytest.raises(InputError, match=r"fails on the channels of all members at once .*use --execution loop"):
        StackedPeers(peers, images)
