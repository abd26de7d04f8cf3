"""Names of networks from elsewhere: what they build, and every way in which they can be wrong."""

import sys

import pytest
import torch

from codistill.cli.main import main
from codistill.config.config import Config, slug
from codistill.models import resolve
from codistill.models.external import parse_source, pretrained_statistics
from codistill.peers.branches import BranchPeers
from codistill.peers.networks import NetworkPeers
from codistill.training.build import build_run
from codistill.utils.errors import InputError

OWN = """
from torch import nn

class Small(nn.Module):
    def __init__(self, num_classes, in_channels, width=4):
        super().__init__()
        self.stem, self.last = nn.Conv2d(in_channels, width, 3), nn.Conv2d(width, width, 3)
        self.head = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.head(self.last(self.stem(x).relu()).mean((2, 3)))

def wrong(num_classes):
    return 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").write_text("")
    (tmp_path / "ours" / "nets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n == "ours" or n.startswith("ours.")]:
        del sys.modules[name]


def test_options_are_python_values_with_commas_in_brackets():
    source = parse_source("timm:swin,depths=(1,1),act=relu,drop_rate=0.5,flag=True")
    assert (source.kind, source.path) == ("timm", "swin")
    assert source.options == {"depths": (1, 1), "act": "relu", "drop_rate": 0.5, "flag": True}
    assert parse_source("resnet8") is None


@pytest.mark.parametrize("width", [0.5, 1.0, 1.2])
def test_mobilenets_of_the_papers_widths(width):
    import torchvision

    ours = resolve(f"torchvision:mobilenet_v2,width_mult={width}")(num_classes=10)
    theirs = torchvision.models.mobilenet_v2(num_classes=10, width_mult=width)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_ones_own_code_is_imported_from_the_working_folder(own):
    peers = NetworkPeers("ours.nets:Small,width=6", 2, 5, in_channels=1, image_size=8)
    assert peers.feature_dims == [6, 6]
    with pytest.raises(InputError, match="--branch-at is needed: Small"):
        BranchPeers("ours.nets:Small", 2, 5, in_channels=1, image_size=8)
    assert BranchPeers("ours.nets:Small", 2, 5, in_channels=1, image_size=8, branch_at="last").num_peers == 2


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm:resnet19", 'timm has no "resnet19"'),
        ("torchvision:resnet19", 'torchvision has no "resnet19" (did you mean "resnet1'),
        ("timm:", "lacks a name"),
        ("timm:resnet10t,nonsense", '"nonsense" is not an option'),
        ("timm:resnet10t,nonsense=3", "cannot be built"),
        ("torchvision:resnet18,nonsense=3", "cannot be built"),
        ("hf:nowhere/at/all", "cannot be built"),
        ("nowhere.at.all:net", 'there is no module "nowhere.at.all"'),
        ("ours.nets:small", 'has no callable "small" (did you mean "Small"?)'),
        ("ours.nets:wrong", "returned int; it must return an nn.Module"),
        ("resnet9", 'unknown model "resnet9" (did you mean "resnet8"?)'),
    ],
)
def test_a_wrong_name_is_one_sentence(name, sentence, own, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", "dml", "--model", name, "--data", "digits", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.strip().count("\n") == 0


@pytest.mark.parametrize(("module", "extra"), [("timm", "timm"), ("transformers", "transformers")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name = {"timm": "timm:resnet18", "transformers": "hf:somewhere"}[module]
    with pytest.raises(InputError, match=rf"pip install {extra}"):
        NetworkPeers(name, 2, 5)


def test_pretrained_weights_that_cannot_be_had_are_one_sentence(monkeypatch):
    def offline(*_args, **_options):
        raise OSError("no route to host")

    import timm.models._builder as builder

    monkeypatch.setattr(builder, "load_pretrained", offline)
    with pytest.raises(InputError, match="--pretrained: the weights of timm:resnet10t are not on this machine"):
        NetworkPeers([resolve("timm:resnet10t", pretrained=True)], 1, 5)


def test_pretrained_classifiers_of_transformers_get_new_heads(tmp_path):
    import transformers

    about = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    trained = transformers.AutoModelForImageClassification.from_config(about)
    trained.save_pretrained(tmp_path)
    peers = NetworkPeers([resolve(f"hf:{tmp_path}", pretrained=True) for _ in range(2)], 2, 5)
    first = peers.export_member(0).model
    key = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(first.state_dict()[key], trained.state_dict()[key])
    assert not torch.equal(peers.member(0).head.weight, peers.member(1).head.weight)


def test_transformers_get_the_statistics_of_their_processor(tmp_path):
    import transformers

    about = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.AutoModelForImageClassification.from_config(about).save_pretrained(tmp_path)
    name = f"hf:{tmp_path}"
    assert pretrained_statistics([name]) == {name: None}  # nothing is said
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}')
    assert pretrained_statistics([name]) == {name: None}
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    transformers.ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
    assert pretrained_statistics([name]) == {name: (tuple(mean), tuple(std))}
    small = {"data": "digits", "train_per_class": 4, "epochs": 1, "batch_size": 8, "peers": 1, "device": "cpu"}
    t = build_run(Config("independent", name, pretrained=True, **small).resolved())
    assert (t.data.mean, t.data.std) == (tuple(mean), tuple(std))


def test_gray_images_are_repeated_for_rgb_networks():
    small = {"data": "digits", "train_per_class": 4, "epochs": 1, "batch_size": 8, "peers": 1, "device": "cpu"}
    t = build_run(Config("independent", "torchvision:mobilenet_v2,width_mult=0.1", **small).resolved())
    assert next(t.loader.epoch(0))[0].shape[2] == 3
    t = build_run(Config("independent", "resnet8", channels=3, **small).resolved())
    assert t.peers.member(0).body.conv1.in_channels == 3


def test_a_name_makes_a_folder_that_any_file_system_takes():
    assert slug("timm:swin,depths=(1,1)") == "timm-swin-depths-1-1"
    out = Config("dml", "timm:resnet18", "folder:../a b").resolved().out
    assert out.startswith("runs/")
    assert not set(out[5:]) & set("/: ()")
