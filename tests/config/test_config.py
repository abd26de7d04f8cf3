"""The options of a run: sections, ranges, what contradicts what, and what a config file may hold."""

import dataclasses
import math

import pytest

from codistill.config.config import CompareConfig, Config, ReproduceConfig
from codistill.config.methods import METHODS, DMLConfig, KDCLConfig, KDConfig, OKDDipConfig, TeacherConfig
from codistill.config.options import DataOptions, MeshOptions, NetworkOptions, OptimOptions, PeerOptions, RunOptions
from codistill.utils.errors import InputError

SECTIONS = (NetworkOptions, DataOptions, PeerOptions, OptimOptions, MeshOptions, RunOptions)


def names(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]


def test_a_config_has_the_fields_of_its_sections_in_their_order():
    assert names(Config) == [name for section in SECTIONS for name in names(section)]
    assert len(set(names(Config))) == len(names(Config))


def test_method_model_and_data_are_given_by_their_place():
    config = Config("okddip", "resnet8", "cifar10", "images", 20)
    assert (config.method, config.model, config.data) == (OKDDipConfig(), ("resnet8",), "cifar10")
    assert (config.data_dir, config.train_per_class) == ("images", 20)
    with pytest.raises(TypeError):
        Config("okddip", "resnet8", "digits", nothing=1)


@pytest.mark.parametrize("options", [Config, CompareConfig, ReproduceConfig])
def test_options_outside_the_identity_exist(options):
    assert set(names(options)) >= options.NOT_IDENTITY


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epochs": 0}, "--epochs is 0; give at least 1"),
        ({"image_size": 7}, "--image-size is 7; give from 8 to 4,096"),
        ({"image_size": 1_000_000}, "--image-size is 1000000; give from 8 to 4,096"),
        ({"data_workers": 100_000}, "--data-workers is 100000; give from 0 to 1,000"),
        ({"lr": math.nan}, "--lr is nan; give a number above 0"),
        ({"lr": 0.0}, "--lr is 0.0; give a number above 0"),
        ({"weight_decay": math.inf}, "--weight-decay is inf; give 0 or more"),
        ({"momentum": 1.0}, "--momentum is 1.0; give from 0 to below 1"),
        ({"seed": -1}, "--seed is -1; give from 0 to 2147483647"),
        ({"seed": 2**31}, "--seed is out of range; give a number below 2.31"),
        ({"milestones": (3, 0)}, r"--milestones is \(3, 0\); give 1 or more, each"),
        ({"fan_out": (2, 2**31)}, "--fan-out is out of range"),
        ({"collective_timeout": 0.5}, "--collective-timeout is 0.5; give 1 second or more"),
        ({"method": OKDDipConfig(temperature=0)}, "--method.temperature is 0; give a number above 0"),
        ({"method": OKDDipConfig(entropy_weight=math.inf)}, "--method.entropy-weight is inf; give a number$"),
        ({"method": KDConfig(alpha=1.1)}, "--method.alpha is 1.1; give from 0 to 1"),
        (
            {"method": KDCLConfig(holdout_fraction=0.0)},
            "--method.holdout-fraction is 0.0; give a number between 0 and 1",
        ),
    ],
)
def test_a_number_out_of_its_range_is_refused(values, sentence):
    with pytest.raises(InputError, match=f"^{sentence}"):
        Config(**values).resolved()


@pytest.mark.parametrize(
    "values",
    [{"momentum": 0.0, "nesterov": False}, {"milestones": ()}, {"image_size": None}, {"seed": 2**31 - 1}, {"lr": 1}],
)
def test_the_ends_of_a_range_and_none_are_accepted(values):
    resolved = Config(**values).resolved()
    assert {name: getattr(resolved, name) for name in values if name != "milestones"}.items() <= values.items()


@pytest.mark.parametrize(
    ("method", "values", "sentence"),
    [
        (OKDDipConfig(), {"peers": 2}, r"needs at least 3 \(auxiliary peers and the leader\)"),
        (OKDDipConfig(), {"ema_decay": 0.9}, "--ema-decay shapes --deploy ema"),
        (DMLConfig(update="alternating"), {"topology": "branches"}, "--method.update alternating"),
        (KDCLConfig(target="naive"), {"mixup": 0.2}, "--mixup makes labels soft, and kdcl's naive target"),
        (KDCLConfig(), {"label_smoothing": 0.1, "cutmix": 1.0}, "--label-smoothing makes labels soft"),
    ],
)
def test_a_method_checks_its_options_against_the_others(method, values, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(method, **values).resolved()
    Config(dataclasses.replace(method)).resolved()


def test_general_weights_take_soft_labels():
    Config(KDCLConfig(target="general"), mixup=0.2).resolved()


def test_network_names_include_a_teachers():
    assert Config(KDConfig(teacher_model="resnet20"), "resnet8").network_names() == ["resnet8", "resnet20"]
    assert Config("dml", ("resnet8", "resnet20")).network_names() == ["resnet8", "resnet20"]
    assert [name for name, method in METHODS.items() if issubclass(method, TeacherConfig)] == ["kd"]


@pytest.mark.parametrize("name", METHODS)
def test_a_config_is_read_back_as_it_was_written(name):
    resolved = Config(name, cutout=2).resolved()
    assert Config.from_dict(resolved.to_dict()) == resolved == resolved.resolved()


def test_networks_and_images_given_as_objects_are_refused_in_a_sentence(tmp_path):
    for model in (object, 3, [len], None):
        with pytest.raises(InputError, match=r"model takes names of networks.*NetworkPeers"):
            Config("dml", model)
    with pytest.raises(InputError, match=r"data takes the name of a data set; give images themselves to .*train"):
        Config("dml", "resnet8", object())
    assert Config("dml", out=tmp_path).out == str(tmp_path)
