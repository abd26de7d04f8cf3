"""Checkpoints: damage is noticed and the one before is used; what is kept; schemas; the best on validation."""

import dataclasses
import lzma
import random
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from codistill.cli.main import main
from codistill.runs import read_epoch_lines
from codistill.runs.checkpoint import (
    SCHEMA,
    CorruptCheckpointError,
    list_checkpoints,
    load_checkpoint,
    write_checkpoint,
)
from codistill.training.load import load_run
from codistill.training.loop import train
from codistill.training.reporter import Reporter
from codistill.utils.errors import InputError
from helpers.common import read_json
from helpers.runs import StopAt, small

STORED = Path(__file__).parent.parent / "golden" / "schema1"


class Notes(Reporter):
    def begin(self, notes, epochs, steps, start):
        self.last = notes[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(small(out, keep_checkpoints=3))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run as it was before its result was written."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    return out


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_and_every_truncation_is_noticed(whole, tmp_path):
    good, path = (whole / "last.pt").read_bytes(), tmp_path / "last.pt"
    rng = random.Random(0)
    places = [rng.randrange(len(good)) for _ in range(150)] + [*range(len(good) - 90, len(good))]
    unnoticed_by_torch = 0
    for place in places:
        path.write_bytes(good)
        flip(path, place, rng.randrange(8))
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(path)
        try:
            torch.load(path, weights_only=True)
            unnoticed_by_torch += 1
        except Exception:
            pass
    assert unnoticed_by_torch > 50  # torch itself reads past the sums that zip keeps
    for length in (0, 1, 63, 64, 100, len(good) // 2, len(good) - 64, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptCheckpointError):
            load_checkpoint(path)
    path.write_bytes(good)
    assert load_checkpoint(path)["epoch"] == 3
    assert zipfile.ZipFile(path).testzip() is None  # it is an archive like any other


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(whole, copy, damage, capsys):
    data = (copy / "last.pt").read_bytes()
    if damage == "flipped":
        flip(copy / "last.pt", data.index(b"archive/data/7") + 200)
    else:
        (copy / "last.pt").write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    notes = Notes()
    with pytest.warns(UserWarning, match=r"last.pt is damaged or no checkpoint \(.*the one before it is used"):
        resumed = train(small(copy, keep_checkpoints=3, resume="auto"), notes)
    assert notes.last == f"resumed at epoch 2, step 0, from {copy / 'last-1.pt'}"
    assert (copy / "damaged-last.pt").exists()
    assert [p.name for p in list_checkpoints(copy)] == ["last.pt", "last-1.pt", "last-2.pt"]
    assert resumed.figures["test"] == read_json(whole / "result.json")["test"]
    assert (copy / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_only_damaged_checkpoints_are_refused_unchanged(copy, capsys):
    for path in list_checkpoints(copy):
        path.write_bytes(b"PK")
    held = {p.name for p in copy.iterdir()} | {"run.lock"}
    with pytest.raises(InputError, match="and the run has no other; train it again"):
        train(small(copy, resume="auto", keep_checkpoints=3))
    assert {p.name for p in copy.iterdir()} == held
    assert main(["evaluate", str(copy), "--allow-import"]) == 2
    assert "is damaged or no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept(tmp_path, keep):
    train(small(tmp_path / "run", keep_checkpoints=keep, epochs=5))
    found = list_checkpoints(tmp_path / "run")
    assert [load_checkpoint(path)["epoch"] for path in found] == [5, 4, 3, 2][:keep]
    with pytest.raises(InputError, match="--keep-checkpoints is 0; give at least 1"):
        small(tmp_path, keep_checkpoints=0).resolved()


def test_a_kill_between_two_names_loses_nothing(whole, copy):
    """The newest has been renamed and its successor has not got its name yet."""
    (copy / "last.pt").rename(copy / "last-1.pt")
    (copy / ".last.pt.0123abcd.tmp").write_bytes(b"half")
    resumed = train(small(copy, keep_checkpoints=3, resume="auto"))
    assert resumed.figures["test"] == read_json(whole / "result.json")["test"]
    assert not list(copy.glob(".*"))


def test_the_best_validation_epoch_is_kept(tmp_path, capsys):
    out = tmp_path / "run"
    result = train(small(out, lr=0.05, epochs=6))
    curve = [line["val_student"]["top1"] for line in read_epoch_lines(out / "metrics.jsonl")]
    best = result.figures["best_validation"]
    assert best["top1"] == max(curve)
    assert best["epoch"] == curve.index(max(curve))
    assert load_checkpoint(out / "best.pt")["epoch"] == best["epoch"] + 1
    assert main(["evaluate", str(out), "--split", "val", "--checkpoint", "best", "--json", "--allow-import"]) == 0
    assert f'"student": {{"top1": {best["top1"]}' in capsys.readouterr().out
    # Nothing is chosen by it unasked: the result is the last epoch's.
    last = load_run(out, allow_import=True).peers.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in result.peers.state_dict().items())
    student = tmp_path / "s.safetensors"
    words = ["--checkpoint", "best", "--allow-import", "--out", str(student)]
    assert main(["export", str(out), *words]) == 0
    assert "the best on validation" in student.with_suffix(".md").read_text()


def test_without_a_validation_part_nothing_is_called_best(tmp_path, capsys):
    out = tmp_path / "run"
    train(small(out, protocol="paper", epochs=1))
    assert not (out / "best.pt").exists()
    assert main(["evaluate", str(out), "--checkpoint", "best", "--allow-import"]) == 2
    assert "only runs with a validation part keep one" in capsys.readouterr().err


def stored(tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(STORED, out)
    (out / "last.pt").write_bytes(lzma.decompress((out / "last.pt.xz").read_bytes()))
    (out / "last.pt.xz").unlink()
    return out


def test_a_stored_checkpoint_of_schema_1_is_read_and_continued(tmp_path):
    out = stored(tmp_path)
    state = load_checkpoint(out / "last.pt")
    assert (state["schema"], state["epoch"], state["step"]) == (1, 1, 1)
    before = load_run(out, allow_import=True).peers.state_dict()
    assert all(torch.equal(before[name], value) for name, value in state["peers"].items())
    options = {"checkpoint_every_steps": 1, "log_every_steps": 1, "resume": "auto"}
    resumed = train(small(out, **options))
    train(small(tmp_path / "anew", **options))
    lines, anew = read_epoch_lines(out / "metrics.jsonl"), read_epoch_lines(tmp_path / "anew" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for ours, theirs in zip(lines, anew):  # another machine adds up in another order
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-3)
    assert resumed.figures["test"]["samples"] == 797
    assert load_checkpoint(out / "last.pt")["schema"] == SCHEMA
    path = stored(tmp_path / "other") / "last.pt"
    flip(path, path.read_bytes().index(b"archive/data/33") + 1000)
    with pytest.raises(CorruptCheckpointError, match="archive/data/33 in it does not match its checksum"):
        load_checkpoint(path)


def test_a_newer_schema_is_refused_in_a_sentence(copy, monkeypatch, capsys):
    state = load_checkpoint(copy / "last.pt")
    monkeypatch.setattr("codistill.runs.checkpoint.SCHEMA", SCHEMA + 1)
    with open(copy / "last.pt", "wb") as stream:
        write_checkpoint({k: v for k, v in state.items() if k != "schema"}, stream)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the older one is not taken in silence either
        assert main(["evaluate", str(copy), "--allow-import"]) == 2
    assert f"written by a newer codistill (schema {SCHEMA + 1}); upgrade codistill" in capsys.readouterr().err


def test_resume_names_its_checkpoint_and_needs_its_checksum(tmp_path):
    config = small(tmp_path / "run", checkpoint_every_steps=1, log_every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, StopAt(1, 2))
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    torch.save(dict(state), tmp_path / "run" / "last.pt")  # schema 2 without its checksum
    with pytest.raises(CorruptCheckpointError, match="its checksum is missing"):
        load_checkpoint(tmp_path / "run" / "last.pt")
    notes = Notes()
    with pytest.warns(UserWarning, match="checksum is missing"):
        train(dataclasses.replace(config, resume="auto"), notes)
    assert notes.last == f"resumed at epoch 1, step 0, from {tmp_path / 'run' / 'last-1.pt'}"
