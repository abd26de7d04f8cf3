"""The files of a run are checked once, where they are read: one sentence that names the file, and nothing is lost."""

import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from codistill.cli.main import main
from codistill.config.config import Config, ReproduceConfig
from codistill.reproduce.plan import make_plan
from codistill.reproduce.report.charts import make_charts
from codistill.reproduce.report.collect import collect_sections
from codistill.reproduce.statistics import format_mean_std, paired_difference
from codistill.reproduce.table_figures import make_figures
from codistill.reproduce.table_rows import make_table_rows
from codistill.runs import RunFolder, RunResult, read_epoch_lines, read_record, write_record
from codistill.runs.checkpoint import load_checkpoint, load_newest, write_checkpoint
from codistill.runs.environment import describe_environment
from codistill.utils.errors import InputError, MachineError
from codistill.utils.files import read_file, write_json
from helpers.command_line import one_sentence
from helpers.common import read_json
from helpers.tables import fake_result

STORED = Path(__file__).parent.parent / "golden" / "run_844e2fa"
LINE = json.loads((STORED / "metrics.jsonl").read_text().splitlines()[0])


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _plotly(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "plotly.offline", SimpleNamespace(get_plotlyjs=lambda: ""))


DAMAGED = [
    ("data.json", '{"classes": 3}', "evaluate RUN --data digits"),
    ("data.json", json.dumps(read_json(STORED / "data.json") | {"std": [0.0]}), "predict RUN IMAGE"),
    ("data.json", json.dumps(read_json(STORED / "data.json") | {"image_size": 10**9}), "predict RUN IMAGE"),
    ("data.json", json.dumps(read_json(STORED / "data.json") | {"mean": [None]}), "evaluate RUN"),
    ("data.json", json.dumps(read_json(STORED / "data.json") | {"schema": 99}), "evaluate RUN"),
    ("config.json", json.dumps(read_json(STORED / "config.json") | {"epochs": -1}), "predict RUN IMAGE"),
    ("config.json", json.dumps(read_json(STORED / "config.json") | {"schema": 99}), "evaluate RUN"),
    ("config.json", "[" * 200_000, "evaluate RUN"),
    ("result.json", json.dumps(read_json(STORED / "result.json") | {"student": None}), "report RUN"),
    ("result.json", json.dumps(read_json(STORED / "result.json") | {"seconds": 10**400}), "report RUN"),
    ("result.json", "[" * 200_000, "report RUN"),
    ("details.json", json.dumps(read_json(STORED / "details.json") | {"confusion": [[1]]}), "report RUN"),
    ("environment.json", '{"threads": "many"}', "export RUN --out OUT"),
    ("result.json", '{"test": {"top1": []}}', "export RUN --out OUT"),
]


@pytest.mark.parametrize(("name", "content", "words"), DAMAGED)
def test_a_file_of_another_shape_is_named_in_one_sentence(name, content, words, run, tmp_path, capsys):
    (run / name).write_text(content)
    names = {"RUN": run, "IMAGE": __file__, "OUT": tmp_path / "s.safetensors"}
    said = one_sentence(capsys, [str(names.get(word, word)) for word in words.split()])
    assert str(run / name) in said
    assert len(said) < 400
    assert not [*tmp_path.glob("s.*")]  # a refused export leaves nothing


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
@pytest.mark.parametrize("name", ["config.json", "data.json", "result.json", "last.pt"])
def test_what_is_no_regular_file_is_refused_without_waiting(kind, name, run, tmp_path, capsys):
    (run / name).unlink()
    if kind == "device":
        (run / name).symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "fifo" else os.mkdir)(run / name)
    said = one_sentence(capsys, ["export", str(run), "--out", str(tmp_path / "s.safetensors")])
    assert f"{run / name} is {'a folder' if kind == 'folder' else 'no regular file'}" in said


@pytest.mark.parametrize("words", ["report RUN --out FILE", "evaluate RUN --confusion FILE"])
def test_a_device_is_not_replaced_by_a_file(words, run, tmp_path, capsys):
    os.mkfifo(tmp_path / "device")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("device", "link"):
        names = {"RUN": run, "FILE": tmp_path / name}
        said = one_sentence(capsys, [str(names.get(word, word)) for word in words.split()])
        assert f"{tmp_path / name} is no regular file; name a file" in said
    assert (tmp_path / "device").is_fifo()
    assert (tmp_path / "link").is_char_device()


def test_a_byte_order_mark_is_read_over_and_an_absurd_size_refused(run, monkeypatch):
    for name in ("config.json", "result.json"):
        (run / name).write_bytes(b"\xef\xbb\xbf" + (run / name).read_bytes())
    assert Config.from_file(run).epochs == 2
    assert read_record(run / "result.json", RunResult)["epochs"] == 2
    monkeypatch.setattr("codistill.utils.files.MAX_BYTES", 100)
    with pytest.raises(InputError, match="is larger than 100 bytes"):
        read_file(run / "config.json")


def test_nan_is_null_in_files_and_nan_again_when_read(run):
    result = read_record(run / "result.json", RunResult)
    assert result == read_json(STORED / "result.json")
    diverged = result | {"student": result["student"] | {"nll": math.nan, "top1": math.inf}}
    write_record(run / "result.json", diverged)
    text = (run / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["student"]["nll"] is None
    student = read_record(run / "result.json", RunResult)["student"]
    assert math.isnan(student["nll"])
    assert math.isnan(student["top1"])
    (run / "result.json").write_text(text.replace("null", "NaN"))  # as earlier versions wrote it
    assert math.isnan(read_record(run / "result.json", RunResult)["student"]["nll"])


def test_a_run_that_diverged_does_not_spoil_the_report_of_others(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    write_json(other / "config.json", read_json(run / "config.json") | {"seed": 1})
    write_json(
        other / "result.json", read_json(run / "result.json") | {"student": {"top1": None, "nll": None, "ece": 1}}
    )
    bad = LINE | {"train": LINE["train"] | {"loss": math.nan}, "val_student": {"top1": math.nan, "nll": 1, "ece": 1}}
    (other / "metrics.jsonl").write_text(json.dumps(bad) + "\n")
    (section,) = collect_sections([run, other])
    assert section.rows[0]["test, last epoch, top-1 %"] == "not finite"
    charts = {chart["title"]: chart for chart in make_charts(section)}
    (curve,) = [t for t in charts["Learning curves"]["views"][0]["traces"] if t.get("name")]
    assert curve["y"] == [round(LINE["val_student"]["top1"], 4), 61.3861]
    assert main(["report", str(run), str(other), "-o", str(tmp_path / "r.html")]) == 0
    assert "NaN" not in (tmp_path / "r.html").read_text()


def test_statistics_of_figures_that_are_not_finite():
    assert format_mean_std([1.0, math.nan]) == "not finite"
    assert paired_difference({0: 1.0, 1: math.nan}, {0: 0.0, 1: 0.0}) is None


def test_only_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(LINE | {"epoch": epoch}) for epoch in range(4)]
    path.write_text("\n".join([lines[0], "", lines[1][:50], lines[2], '{"epoch": 7}', lines[3], lines[3][:40]]))
    with pytest.warns(UserWarning, match="line [35] is damaged and left out") as caught:
        assert [line["epoch"] for line in read_epoch_lines(path)] == [0, 2, 3]
    assert len(caught) == 2  # the last line may be torn
    config = Config("okddip", out=str(tmp_path / "new")).resolved()
    folder = RunFolder(config)
    folder.path.mkdir()
    shutil.copy(path, folder.path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder.truncate_metrics(3)
    assert (folder.path / "metrics.jsonl").read_text() == f"{lines[0]}\n{lines[2]}\n"


def test_a_line_of_a_newer_codistill_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"schema": 2, "epoch": "first"}) + "\n")
    with pytest.raises(InputError, match="newer codistill"):
        read_epoch_lines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peers": {"x": 1}}, "Expected a Tensor"),
        ({"epoch": "0"}, "Expected `int`"),
        ({"best": {"top1": 1.0}}, "missing key `nll`"),
        ({"optimizers": None}, "Expected `array`"),
        ({"optimizers": [torch.zeros(3)]}, "'Tensor' object has no attribute 'keys'"),
    ],
)
def test_a_checkpoint_of_another_shape_is_damaged(change, sentence, run):
    state = torch.load(run / "last.pt", weights_only=True)
    with open(run / "last.pt", "wb") as stream:
        write_checkpoint(state | change, stream)
    with pytest.raises(InputError, match="is damaged or no checkpoint") as caught:
        load_checkpoint(run / "last.pt")
    assert sentence in str(caught.value)


def test_a_checkpoint_that_does_not_fit_its_run_is_named(run, capsys):
    state = torch.load(run / "last.pt", weights_only=True)
    del state["peers"]["members.0.head.weight"]
    with open(run / "last.pt", "wb") as stream:
        write_checkpoint(state, stream)
    for words in (["evaluate", str(run)], ["predict", str(run), __file__]):
        assert f"{run / 'last.pt'} does not fit the run's config.json" in one_sentence(capsys, words)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(error, run, monkeypatch):
    def fail(*_, **__):
        raise error

    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr("torch.load", fail)
    with pytest.raises((InputError, MemoryError)) as caught:
        load_newest(run, rename_damaged=True)
    assert "damaged" not in str(caught.value)
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_report_passes_over_what_is_no_run(run, tmp_path, capsys):
    for name, content in (("foreign", '{"model_type": "bert"}'), ("damaged", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "grid.json").write_text('{"of": "another program"}')
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr()
    assert "1 runs" in said.out
    assert said.err.count("is left out") == 3
    (tmp_path / "config.json").write_text('{"name": "another program beside the runs"}')
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().err.count("is left out") == 4
    assert one_sentence(capsys, ["report", str(tmp_path / "foreign"), "-o", str(tmp_path / "r.html")])


def test_a_grid_that_states_thousands_of_millions_of_seeds_is_refused_or_listed(run, tmp_path, capsys):
    grid = tmp_path / "grid"
    shutil.copytree(run, grid / "a" / "seed0")
    info = {"kind": "compare", "title": "t", "seeds": 100_000, "cells": [{"label": "a", "baseline": None}]}
    write_json(grid / "grid.json", info)
    (section,) = collect_sections([grid])
    assert [len(group.runs) for group in section.groups] == [1]
    write_json(grid / "grid.json", info | {"seeds": 10**9})
    assert main(["report", str(grid), "-o", str(tmp_path / "r.html")]) == 0
    assert "grid.json is damaged or another program's" in capsys.readouterr().err


def test_a_run_counts_once_however_it_is_named(run, tmp_path):
    grid = tmp_path / "grid"
    shutil.copytree(run, grid / "a" / "seed0")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (section,) = collect_sections([run, grid, copy])
    assert section.rows[0]["n"] == "1"
    assert section.rows[0]["test, last epoch, top-1 %"] == "59.72 (n=1)"
    assert sum("it repeats seed 0 of" in note for note in section.notes) == 2
    write_json(
        grid / "grid.json", {"kind": "compare", "title": "t", "seeds": 1, "cells": [{"label": "a", "baseline": None}]}
    )
    sections = collect_sections([grid / "a" / "seed0", grid])
    assert [section.name for section in sections] == ["Comparison"]


def test_figures_that_nobody_measured_are_a_dash(tmp_path):
    plan = make_plan("kdcl_table3", ReproduceConfig(scale="smoke", out=str(tmp_path)))
    for cell in plan.cells:
        cell.results[0] = fake_result(50.0, len(cell.config.model))
    rows = make_table_rows(plan, make_figures(plan))
    top5 = [row for figure, row in zip(make_figures(plan), rows) if figure.ref.metric == "top5"]
    assert top5
    (column,) = [name for name in rows[0] if name.startswith("test, last epoch")]
    assert {row[column] for row in top5} == {"-"}


def test_the_commit_is_that_of_codistill_and_the_users_has_its_own_name(tmp_path, monkeypatch):
    """A package in a .venv inside a repository of somebody else's is not of that repository's commit."""
    own = describe_environment()
    answers = {"rev-parse HEAD": "c0ffee", "rev-parse --show-toplevel": str(tmp_path), "status --porcelain -uno": ""}
    monkeypatch.setattr("codistill.runs.environment._run_git", lambda folder, *words: answers.get(" ".join(words)))
    found = describe_environment()
    assert found["git_commit"] is None
    assert found["user_git_commit"] == "c0ffee"
    assert found["codistill"] == own["codistill"]


@pytest.mark.parametrize("how", ["deleted", "renamed", "unlocked"])
def test_a_folder_that_is_taken_away_while_it_trains_is_noticed(how, tmp_path):
    folder = RunFolder(Config("okddip", out=str(tmp_path / "run")).resolved())
    with folder.lock():
        folder.append_metrics(LINE)
        if how == "unlocked":
            (folder.path / "run.lock").unlink()
        elif how == "deleted":
            shutil.rmtree(folder.path)
        else:
            folder.path.rename(tmp_path / "elsewhere")
        for write in (
            lambda: folder.append_metrics(LINE),
            lambda: folder.save({}),
            lambda: folder.write_result({}, {}),
        ):
            with pytest.raises(MachineError, match="was deleted, renamed or replaced while the run trained"):
                write()
        assert folder.path.exists() == (how == "unlocked")


def test_an_empty_folder_in_the_place_of_the_runs_is_left_alone(tmp_path):
    folder = RunFolder(Config("okddip", out=str(tmp_path / "run")).resolved())
    with folder.lock():
        folder.path.rename(tmp_path / "elsewhere")
        folder.path.mkdir()
        with pytest.raises(MachineError, match="replaced while the run trained"):
            folder.append_metrics(LINE)
    assert folder.path.is_dir()


def test_a_config_that_is_deleted_while_a_run_trains_is_written_again(tmp_path):
    folder = RunFolder(Config("okddip", out=str(tmp_path / "run")).resolved())
    with folder.lock():
        folder.write_metadata()
        before = (folder.path / "config.json").read_bytes()
        (folder.path / "config.json").unlink()
        folder.write_result({}, {})
    assert (folder.path / "config.json").read_bytes() == before
