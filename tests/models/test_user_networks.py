"""Networks that codistill does not know: what a run does with them is tried before its first epoch."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from codistill.config.config import Config
from codistill.evaluation.fold_batchnorm import folded_for_evaluation
from codistill.models.external import parse_source
from codistill.models.weights import load_weights, read_weights, without_wrappers
from codistill.peers.ema import MeanTeacher
from codistill.peers.modes import copy_module
from codistill.peers.networks import NetworkPeers
from codistill.training.build import build_run
from codistill.training.loop import train
from codistill.training.trial import CONTIGUOUS_NOTE
from codistill.utils.errors import InputError
from helpers.command_line import one_sentence
from helpers.runs import tiny

OWN = """
from torch import nn

class Flat(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_channels, 4, 3), nn.Linear(4 * 6 * 6, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).view(-1, 4 * 6 * 6))

class InPlace(Flat):
    def forward(self, x):
        y = self.conv(x).sigmoid()
        z = y * y
        y.add_(1)
        return self.head(z.flatten(1))

class not_finite(Flat):
    def forward(self, x):
        return super().forward(x) * float("nan")

class complex_numbers(Flat):
    def forward(self, x):
        return super().forward(x) * 1j

class ends_in_training(Flat):
    def forward(self, x):
        if self.training:
            raise ValueError("stop")
        return super().forward(x)

def quit():
    raise SystemExit(3)
"""

WRAPPERS = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_networks", None)


def test_a_network_that_views_gets_contiguous_images(own):
    run = build_run(tiny(model="own_networks:Flat", method="independent", peers=2).resolved())
    assert not run.config.channels_last
    assert run.notes == [CONTIGUOUS_NOTE]
    assert run.loader.sample_batch()[0].is_contiguous()
    result = train(tiny(model="own_networks:Flat", method="independent", peers=2, epochs=1, out=str(own / "run")))
    assert result.student(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_trial_changes_no_number(own):
    config = tiny(model="tiny_network:Tiny", method="independent", peers=2).resolved()
    run = build_run(config)
    drawn = torch.rand(3), np.random.rand(3)
    for name, buffer in run.peers.named_buffers():
        expected = 1.0 if name.endswith("var") else 0.0
        assert (buffer == expected).all(), name
    build_run(config)
    again = torch.rand(3), np.random.rand(3)
    assert all((a == b).all() for a, b in zip(drawn, again))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own_networks:InPlace", "training fails on images of 1 x 8 x 8 (one of the variables needed for gradient"),
        ("own_networks:quit", "cannot be built (it ends the process with 3)"),
        ("own_networks:not_finite", "returns numbers that are not finite; peers need floating-point logits"),
        ("own_networks:complex_numbers", "returns numbers of torch.complex64; peers need floating-point logits"),
        ("own_networks:ends_in_training", "cannot train on images of 1 x 8 x 8 (stop); fix its forward, or give"),
        ("time:time", "is a function of Python itself"),
        ("os:abort", "is a function of Python itself"),
        ("torch.nn:Identity", "returned Identity, which has no parameters to train"),
    ],
)
def test_code_that_is_no_network_is_refused(own, capsys, model, said):
    words = ["train", "independent", "--peers", "1", "--data", "digits", "--model", model, "--out", "run"]
    assert said in one_sentence(capsys, words)
    assert not (own / "run").exists()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_that_are_computed_are_copied_and_not_folded(wrap):
    class Wrapped(nn.Module):
        def __init__(self, num_classes=3):
            super().__init__()
            self.conv, self.plain = wrap(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3)
            self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, num_classes)

        def forward(self, x):
            return self.head(self.norm2(self.plain(self.norm(self.conv(x)))).mean((2, 3)))

    peers = NetworkPeers(Wrapped, 2, 3, image_size=8)
    x = torch.randn(4, 3, 8, 8)
    peers(x).logits_PBC.sum().backward()
    peers.eval()
    with torch.no_grad():
        expected = peers(x).logits_PBC
        folded = folded_for_evaluation(peers, x)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 2  # one a member is folded
        torch.testing.assert_close(folded(x).logits_PBC, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy_module(peers)(x).logits_PBC, expected)
        torch.testing.assert_close(MeanTeacher(peers, 0.9).eval()(x).logits_PBC, expected)
        torch.testing.assert_close(peers.export_member(1).eval()(x), expected[1])


def test_a_network_for_another_size_is_refused():
    class Fixed(nn.Module):
        def __init__(self, num_classes=3):
            super().__init__()
            self.head = nn.Linear(3 * 4 * 4, num_classes)

        def forward(self, x):
            return self.head(x.reshape(-1, 48))

    with pytest.raises(InputError, match="returns 4 rows for one image of 3 x 8 x 8"):
        NetworkPeers(Fixed, 1, 3, image_size=8)


def test_a_callable_without_a_signature_is_refused():
    with pytest.raises(InputError, match="returned int"):
        parse_source("builtins:int")(num_classes=3)


def test_built_in_networks_are_not_tried(monkeypatch):
    monkeypatch.setattr("codistill.training.trial._try", lambda *_: pytest.fail("tried"))
    build_run(Config("independent", "resnet8", "digits", peers=1).resolved())


class Net(nn.Module):
    def __init__(self, num_classes=3, in_channels=3):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.backbone."])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", None])
def test_weights_of_wrapped_networks_load(prefix, key, tmp_path):
    trained = Net()
    state = {prefix + name: value for name, value in trained.state_dict().items()} | {"loss.weight": torch.zeros(3)}
    if not prefix.startswith("model."):
        del state["loss.weight"]
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
    network = load_weights(Net(), read_weights(str(tmp_path / "w.pt")), "--weights w.pt")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in network.state_dict().items())


def test_a_prefix_that_cannot_be_dropped_is_named():
    weights = {f"encoder.{name}": value for name, value in Net().state_dict().items() if "norm" not in name}
    with pytest.raises(InputError, match=r"at conv.weight \(the file has encoder.conv.weight\)"):
        load_weights(Net(), weights, "--weights w.pt")


def test_names_of_wrapped_networks_have_no_prefix():
    compiled = torch.compile(Net(), backend="eager")
    assert isinstance(compiled, nn.Module)
    network = nn.DataParallel(compiled)
    assert without_wrappers(network).state_dict().keys() == Net().state_dict().keys()
    weights = Net().state_dict()
    load_weights(network, weights, "--weights w.pt")
    assert torch.equal(without_wrappers(network).conv.weight, weights["conv.weight"])


@pytest.mark.parametrize(
    ("method", "model", "works"),
    [
        ("independent", "tiny_network:Tiny", False),  # its BatchNorm sees one value a channel
        ("cosub", "tiny_network:Dropping", True),  # each image has two rows
        ("independent", "resnet8", True),  # its last maps are 2 x 2
    ],
)
def test_batches_of_one_image_train_or_are_refused_before_the_first_step(method, model, works, tmp_path):
    options = {"peers": None, "batch_size": 1, "epochs": 1, "train_per_class": 1, "out": str(tmp_path / "r")}
    config = tiny(method=method, model=model, **options)
    if works:
        assert math.isfinite(train(config).figures["student"]["nll"])
        return
    with pytest.raises(InputError, match=r"--batch-size 1: .* cannot be trained on one image at a time .*; give 2"):
        train(config)
    assert not (tmp_path / "r" / "last.pt").exists()


def test_a_file_with_two_state_dicts_names_them(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    torch.save({"net": state, "ema": state, "epoch": 3}, tmp_path / "two.pt")
    with pytest.raises(InputError, match=r"contains no state dict but 2 \(net, ema\); save one of them alone"):
        read_weights(str(tmp_path / "two.pt"))
