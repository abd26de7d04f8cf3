"""kd's teacher from everywhere it may come from, and what is said when it cannot be had."""

import json

import pytest
import torch

from codistill.cli.main import main
from codistill.config.config import Config
from codistill.config.methods import KDConfig
from codistill.models import resolve
from codistill.training.build import build_run
from codistill.training.loaders import test_loader as whole_test_set
from codistill.training.loop import train
from codistill.utils.errors import InputError
from helpers.common import read_json

SMALL = ["--model", "resnet8", "--train-per-class", "6", "--batch-size", "16", "--epochs", "2"]


def student(teacher, model=None, **options) -> Config:
    method = KDConfig(teacher=teacher and str(teacher), teacher_model=model)
    return Config(method, "resnet8", "digits", train_per_class=6, batch_size=16, epochs=2, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    assert main(["train", "okddip", *SMALL, "--topology", "branches", "--out", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), "--out", str(folder / "student.safetensors")]) == 0
    torch.save({"state_dict": setup_plain(folder / "run").state_dict()}, folder / "plain.pt")
    return folder


def setup_plain(path):
    from codistill.training.load import load_run
    from codistill.training.student import deployed_network

    return deployed_network(load_run(path))


def test_all_teacher_sources_give_the_same_teacher(run):
    ways = [(run / "run", None), (run / "student.safetensors", None), (run / "plain.pt", "resnet8")]
    teachers = [build_run(student(path, model).resolved()).teacher for path, model in ways]
    x = torch.randn(4, 1, 8, 8)
    expected = setup_plain(run / "run")(x)
    for teacher in teachers:
        assert not teacher.training
        assert torch.allclose(teacher(x), expected, atol=1e-6)
        assert not any(p.requires_grad for p in teacher.parameters())


def test_any_module_may_teach_from_python(tmp_path):
    teacher = resolve("resnet20")(num_classes=10, in_channels=1)
    before = [p.clone() for p in teacher.parameters()]
    result = train(student(None, out=str(tmp_path / "run")), teacher=teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    line = read_json(tmp_path / "run" / "result.json")
    assert line["student"]["top1"] == result.figures["student"]["top1"]


def test_the_command_line_distils_from_a_run(run, tmp_path):
    words = ["train", "kd", *SMALL, "--method.teacher", str(run / "run"), "--out", str(tmp_path / "run")]
    assert main(words) == 0


def test_a_teacher_that_cannot_be_had_is_named(run, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"not tensors at all")
    (tmp_path / "damaged.pt").write_bytes(b"not a pickle")
    (tmp_path / "empty").mkdir()
    for path, model, sentence in (
        (None, None, "kd needs a teacher; give --method.teacher"),
        (tmp_path / "nothing", None, "does not exist"),
        (tmp_path / "empty", None, "is no run folder"),
        (tmp_path / "damaged.safetensors", None, "damaged or was not exported"),
        (tmp_path / "damaged.pt", "resnet8", "cannot be read"),
        (run / "plain.pt", None, "--method.teacher-model NAME"),
        (run / "plain.pt", "resnet20", "does not fit this data"),
        (run / "plain.pt", "resnet9", 'unknown model "resnet9"'),
    ):
        with pytest.raises(InputError) as caught:
            build_run(student(path, model).resolved())
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_teacher_for_other_classes_is_refused(run, tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(0, 255, (30, 8, 8), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "three.npz", **arrays, y_train=np.arange(30) % 3, y_test=np.arange(30) % 3)
    config = Config(KDConfig(teacher=str(run / "run")), "resnet8", f"npz:{tmp_path / 'three.npz'}", batch_size=8)
    with pytest.raises(InputError, match=r"does not fit this data \(3 classes"):
        build_run(config.resolved())


def test_a_tree_of_forks_trains_from_the_command_line(tmp_path):
    tree = ["--branch-at", "layer2", "layer3", "--fan-out", "2", "2"]
    assert main(["train", "cl_ilr", *SMALL, *tree, "--out", str(tmp_path / "run")]) == 0
    assert read_json(tmp_path / "run" / "config.json")["peers"] == 4


def right(t) -> float:
    """Return how many test images the teacher of a run that is set up gets right, in percent."""
    hits = [(t.teacher(views[0]).argmax(-1) == labels) for views, labels in whole_test_set(t).epoch()]
    return torch.cat(hits).double().mean().item() * 100


def test_a_teacher_sees_images_normalised_as_it_was_trained_with(tmp_path):
    own = Config("independent", "resnet8", "digits", peers=1, epochs=6, normalize="0.9,0.1", out=str(tmp_path / "run"))
    top1 = train(own).figures["student"]["top1"]
    assert top1 > 50
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "student.safetensors")]) == 0
    for path in (tmp_path / "run", tmp_path / "student.safetensors"):
        assert right(build_run(student(path).resolved())) == pytest.approx(top1, abs=0.2)


def test_a_mean_teacher_that_was_deployed_is_what_teaches(tmp_path):
    own = Config("pcl", "resnet8", "digits", peers=2, epochs=2, deploy="ema", out=str(tmp_path / "run"))
    train(own)
    teacher, expected = build_run(student(tmp_path / "run").resolved()).teacher, setup_plain(tmp_path / "run")
    for name, value in expected.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name
    norm = expected.bn1
    assert norm.track_running_stats
    before = norm.running_mean.clone()
    expected.train()(torch.randn(4, 1, 8, 8))
    assert not torch.equal(before, norm.running_mean)


def test_a_teacher_of_other_classes_by_name_is_refused(run, tmp_path):
    import shutil

    shutil.copytree(run / "run", tmp_path / "run")
    about = read_json(tmp_path / "run" / "data.json")
    about["classes"][2:4] = about["classes"][3:1:-1]
    (tmp_path / "run" / "data.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r'knows other classes, or another order .*"3" in place of "2"'):
        build_run(student(tmp_path / "run").resolved())
