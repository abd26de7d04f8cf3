"""The files that runs and grids keep, damaged, gone or of another run: none is lost, a sentence says what is wrong."""

import shutil

import pytest

from codistill.cli.main import main
from codistill.config.config import Config, ReproduceConfig
from codistill.reproduce.plan import make_plan
from codistill.reproduce.table_folder import prepare_table_folder, read_plan
from codistill.runs import read_epoch_lines
from codistill.training.loop import train
from codistill.utils.errors import InputError
from helpers.common import read_json
from helpers.runs import small

ROW = ["--data=digits", "--model=tiny_network:Tiny", "--train-per-class=6", "--batch-size=16", "--peers=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "run"
    train(small(out))
    return out


def ended(capsys, words, code=2) -> str:
    capsys.readouterr()
    assert main(words) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
@pytest.mark.parametrize("words", ["evaluate RUN", "predict RUN photo.png", "export RUN --out RUN/s.safetensors"])
def test_damaged_descriptions_of_images_are_named(content, words, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text(content)
    (tmp_path / "photo.png").write_bytes(b"")
    words = words.replace("RUN", str(tmp_path / "run")).replace("photo.png", str(tmp_path / "photo.png"))
    assert "data.json is damaged" in ended(capsys, [*words.split(), "--allow-import"])


@pytest.mark.parametrize("gone", [True, False])
def test_a_complete_run_without_its_last_weights_is_left_alone(gone, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for path in (tmp_path / "run").glob("last*.pt"):
        if gone:
            path.unlink()
        elif path.name == "last.pt":
            path.write_bytes(path.read_bytes()[:-100])
    before = read_epoch_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(before) == 3
    with pytest.raises(InputError, match="is complete, but the checkpoint of its last epoch is gone or damaged"):
        train(small(tmp_path / "run", resume="auto"))
    assert read_epoch_lines(tmp_path / "run" / "metrics.jsonl") == before
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_another_comparison_in_the_same_folder_is_refused(tmp_path, capsys):
    compare = ["compare", "independent", *ROW, "--seeds", "1", "--out", str(tmp_path / "grid")]
    assert main([*compare, "--epochs", "1"]) == 0
    held = {path: path.read_bytes() for path in (tmp_path / "grid").glob("*.*")}
    assert "is another comparison's" in ended(capsys, [*compare, "--epochs", "2"])
    assert held == {path: path.read_bytes() for path in (tmp_path / "grid").glob("*.*")}
    for flag, value in (("--seed", "7"), ("--resume", "auto")):
        said = ended(capsys, [*compare, "--epochs", "1", flag, value])
        assert f"{flag}: compare trains --seeds seeds from --first-seed on" in said
    result = next((tmp_path / "grid").rglob("result.json"))
    good = result.read_text()
    result.write_text("{")
    assert "result.json is damaged" in ended(capsys, [*compare, "--epochs", "1"], 1)
    report = ["report", str(tmp_path / "grid"), "--out", str(tmp_path / "report.html")]
    assert main(report) == 0  # the other runs are shown
    said = capsys.readouterr().err
    assert "seed0 is left out" in said
    assert "result.json is damaged" in said
    result.write_text(good)
    (tmp_path / "grid" / "grid.json").write_text("[]")
    assert main(report) == 0
    assert "grid.json is damaged" in capsys.readouterr().err


def test_a_run_named_twice_counts_once(run, tmp_path, capsys):
    from codistill.reproduce.report.collect import collect_sections

    (section,) = collect_sections([run, run.parent / "." / "run", run])
    assert [len(group.runs) for group in section.groups] == [1]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [({"model": ()}, "--model names no network"), ({"out": "runs/a\0b"}, "--out contains a null character")],
)
def test_a_config_that_names_nothing_or_no_file_is_refused(values, sentence):
    with pytest.raises(InputError, match=sentence):
        Config(**values).resolved()


def test_sizes_too_small_to_list_branch_points_are_refused(capsys):
    assert "--image-size is -5; give 8 or more" in ended(capsys, ["list", "branch-points", "--image-size", "-5"])


def test_a_smoke_table_remembers_the_network_that_it_picked(tmp_path):
    for network in ([], ["vgg16"]):
        options = ReproduceConfig(scale="smoke", out=str(tmp_path / "grid"), network=network)
        prepare_table_folder(make_plan("okddip_table2", options))
    held = read_json(tmp_path / "grid" / "grid.json")
    assert {cell.network for cell in read_plan(tmp_path / "grid", held).cells} == {"densenet40_12", "vgg16"}
