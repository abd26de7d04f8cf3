"""Files of strangers: nothing in them is run, followed elsewhere, given the room that it claims, or shown as code."""

import csv
import io
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from codistill.cli.console import RichReporter, new_table, out, print_rows
from codistill.cli.main import main
from codistill.cli.options import parse
from codistill.config.config import CompareConfig, Config
from codistill.data import ImageSet, load_set
from codistill.evaluation import write_confusion
from codistill.models import build, resolve
from codistill.reproduce import format_command
from codistill.reproduce.comparison import write_comparison
from codistill.runs.environment import describe_environment
from codistill.training.loop import train
from codistill.utils.errors import InputError
from codistill.utils.files import write_json
from codistill.utils.safe_load import load_tensors
from codistill.utils.tables import comma_separated, escape_markdown
from helpers.command_line import one_sentence
from helpers.common import read_json
from helpers.images import Malicious, arrays, write_npz

EVIL = "<img src=x onerror=alert(1)> & [b]*x*[/b] `y` </script>\n\x1b[31m"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("security") / "run"
    train(Config("okddip", "resnet8", "digits", peers=3, train_per_class=6, batch_size=16, epochs=1, out=str(out)))
    return out


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["torch", "bare"])
@pytest.mark.parametrize(
    "words",
    [
        "evaluate {run}",
        "export {run} --out {out}.safetensors",
        "predict {run} {image}",
        "train okddip {small} --out {run} --resume auto",
        "train okddip {small} --out {out} --weights {run}/last.pt",
        "train kd {small} --peers 1 --out {out} --method.teacher {run}",
        "train kd {small} --peers 1 --out {out} --method.teacher {run}/last.pt --method.teacher-model resnet8",
    ],
)
def test_a_pickle_that_runs_code_is_refused_everywhere(words, how, run, tmp_path, capsys):
    mark, place = tmp_path / "ran", tmp_path / "run"
    shutil.copytree(run, place)
    (place / "result.json").unlink()
    evil = {"schema": 1, "peers": Malicious(mark)}
    if how == "torch":
        torch.save(evil, place / "last.pt")
    else:
        (place / "last.pt").write_bytes(pickle.dumps(evil))
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    names = {"run": place, "out": tmp_path / "out", "image": tmp_path / "image.png"}
    names["small"] = "--model resnet8 --train-per-class 6 --batch-size 16 --epochs 1"
    words = words.format(**names)
    if "okddip" in words:
        words += " --peers 3"
    assert "more than tensors and plain values" in one_sentence(capsys, words.split())
    assert not mark.exists()


def test_a_report_opens_no_checkpoint(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    torch.save({"schema": 1, "peers": Malicious(tmp_path / "ran")}, tmp_path / "run" / "last.pt")
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "plotly.offline", SimpleNamespace(get_plotlyjs=lambda: ""))
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "r.html")]) == 0
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused(tmp_path):
    """The number of elements that the pickle states leads past the record's end."""
    torch.save({"x": torch.zeros(64)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "forged.pt", "w") as forged:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"K\x40") == 2  # the storage's length, the tensor's
                data = data.replace(b"K\x40", b"J" + struct.pack("<i", 1 << 24))
            forged.writestr(name, data)
    with pytest.raises(ValueError, match="record size"):
        load_tensors(tmp_path / "forged.pt")


# -- arrays ------------------------------------------------------------------------------------------------------------


def npy(shape: str, descr: str = "|u1", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def archive(path, **members: bytes):
    """Write an npz of good arrays, some replaced."""
    with zipfile.ZipFile(path, "w") as out:
        for name, array in arrays().items():
            stream = io.BytesIO()
            np.save(stream, array)
            out.writestr(f"{name}.npy", members.get(name, stream.getvalue()))
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(1099511627776, 8, 8, 3)", "|u1"),  # 192 TiB
        ("(60000, 224, 224, 3)", "|u1"),  # 9 GB: a machine may well give the room
        ("(3, 8, 8, 3)", "<f8"),
        ("(18446744073709551616,)", "|u1"),  # 2**64
        ("(-1, 8, 8, 3)", "|u1"),
        ("(9223372036854775807, 9223372036854775807)", "<u8"),
    ],
)
def test_arrays_that_claim_too_much_are_refused_early(shape, descr, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("numpy.lib.format.read_array", lambda *args, **kwargs: asked.append(args))
    data = archive(tmp_path / "forged.npz", x_train=npy(shape, descr, b"\0" * 64))
    said = one_sentence(capsys, ["train", "okddip", "--data", data, "--out", str(tmp_path / "out")])
    assert "cannot be read (" in said
    assert not asked


def test_an_archive_that_unfolds_without_end_is_refused(tmp_path, capsys):
    """Its directory says that 300 bytes hold 2 GB."""
    path = tmp_path / "bomb.npz"
    data = archive(path)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\x01\x02")
    raw[place + 24 : place + 28] = struct.pack("<I", 2_000_000_000)
    path.write_bytes(raw)
    assert "claims 2,000,000,000 bytes" in one_sentence(capsys, ["train", "okddip", "--data", data])


def test_arrays_of_objects_and_of_no_array_are_refused(tmp_path, capsys):
    mark = tmp_path / "ran"
    for number, content in enumerate((b"no array", b"", npy("(3,)", "|O", pickle.dumps([Malicious(mark)] * 3)))):
        data = archive(tmp_path / f"{number}.npz", y_train=content)
        assert "cannot be read (" in one_sentence(capsys, ["train", "okddip", "--data", data])
    assert not mark.exists()
    assert main(["train", "okddip", "--data", write_npz(tmp_path / "good.npz"), "--model", "resnet8", "--batch-size",
                 "4", "--epochs", "1", "--out", str(tmp_path / "out")]) == 0  # fmt: skip


# -- images ------------------------------------------------------------------------------------------------------------


def bomb(path, side: int = 60_000) -> None:
    """Write a PNG of a few hundred bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def image_folder(path):
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (8, 8), 20 * number).save(path / name / f"{number}.png")
    return path


def test_an_image_that_unfolds_into_gigabytes_is_refused(tmp_path, run, capsys):
    folder = image_folder(tmp_path / "photos")
    bomb(folder / "cat" / "bomb.png")
    said = one_sentence(capsys, ["train", "okddip", "--data", f"folder:{folder}", "--out", str(tmp_path / "out")])
    assert "cat/bomb.png cannot be read as an image" in said
    assert main(["predict", str(run), str(folder / "cat" / "bomb.png"), str(folder / "cat" / "1.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "decompression bomb" in rows[0]["error"]
    assert "error" not in rows[1]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_an_image_folder_are_named_and_not_followed(what, tmp_path, run, capsys):
    folder, private = image_folder(tmp_path / "photos"), image_folder(tmp_path / "private")
    (folder / "cat" / "inside.png").symlink_to("1.png")
    (folder / "cow").symlink_to("dog")
    words = ["--model", "resnet8", "--batch-size", "4", "--epochs", "1"]
    assert main(["train", "okddip", "--data", f"folder:{folder}", *words, "--out", str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "data.json")["classes"] == ["cat", "cow", "dog"]
    link = folder / ("cat/secret.png" if what == "file" else "passport")
    link.symlink_to(private / ("cat/1.png" if what == "file" else "cat"))
    capsys.readouterr()
    said = one_sentence(capsys, ["train", "okddip", "--data", f"folder:{folder}", *words, "--out", str(tmp_path / "o")])
    assert f"{link} is a link out of {folder}" in said
    assert f"{link} is a link to outside the folder" in one_sentence(capsys, ["predict", str(run), str(folder)])


@pytest.mark.parametrize(
    "links",
    [{"cow": "."}, {"cat/again": ".."}, {"cat/again": "."}, {"cat/x": "../dog", "dog/y": "../cat"}],
)
def test_links_that_form_a_loop_are_named_and_not_followed(links, tmp_path):
    folder = image_folder(tmp_path / "photos")
    for name, target in links.items():
        (folder / name).symlink_to(target)

    with pytest.raises(InputError, match="is a link to a folder, as only the folder of a class may be"):
        load_set(f"folder:{folder}")


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "last.pt", "environment.json", "trained_images.bin"])
def test_no_file_of_the_user_is_written_through_a_link_in_a_run_folder(name, run, tmp_path, capsys):
    place, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(run, place)
    (place / "result.json").unlink()
    content = (place / name).read_bytes() if (place / name).exists() else b"mine"
    precious.write_bytes(content)
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(precious)
    words = ["--model", "resnet8", "--peers", "3", "--train-per-class", "6", "--batch-size", "16", "--epochs", "1"]
    words = ["train", "okddip", *words, "--out", str(place), "--resume", "auto"]
    if name == "run.lock":
        assert f"{place / name} is a link; remove it" in one_sentence(capsys, words)
    else:
        assert main(words) == 0
    assert precious.read_bytes() == content


@pytest.mark.parametrize("how", ["fsmonitor", "filter", "hook"])
def test_a_checkout_of_strangers_runs_nothing(how, tmp_path, monkeypatch):
    """Its own configuration names programs that git runs, and a run notes the commit of the working folder."""
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)  # noqa: E731
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    (tmp_path / ".gitattributes").write_text("a filter=evil")
    git("add", ".")
    git("-c", "user.email=a@b.c", "-c", "user.name=a", "commit", "-qm", "a")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\ncat\n")
    program.chmod(0o755)
    if how == "hook":
        (tmp_path / ".git" / "hooks").mkdir(exist_ok=True)
        shutil.copy(program, tmp_path / ".git" / "hooks" / "post-index-change")
    else:
        git("config", {"fsmonitor": "core.fsmonitor", "filter": "filter.evil.clean"}[how], str(program))
    os.utime(tmp_path / "a", (1, 1))
    monkeypatch.chdir(tmp_path)
    commit = describe_environment()["user_git_commit"]
    assert len(commit) == 40  # no changes
    assert not (tmp_path / "ran").exists()
    if how != "filter":  # which would have to be run to know
        (tmp_path / "a").write_text("2")
        assert describe_environment()["user_git_commit"] == commit + "+"
    assert not (tmp_path / "ran").exists()


# -- words -------------------------------------------------------------------------------------------------------------


def test_names_are_escaped_in_the_page(tmp_path, run, monkeypatch):
    """Class names, the run's folder, data and title; and the machine's description, which a folder may forge."""
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "plotly.offline", SimpleNamespace(get_plotlyjs=lambda: ""))
    place = tmp_path / "<script>alert(2)<"
    shutil.copytree(run, place)
    details, config = read_json(place / "details.json"), read_json(place / "config.json")
    write_json(place / "details.json", details | {"classes": [EVIL + str(c) for c in range(10)], "deployed": EVIL})
    write_json(place / "config.json", config | {"data": f"folder:{EVIL}"})
    write_json(place / "environment.json", read_json(place / "environment.json") | {"gpu": EVIL, "torch": EVIL})
    out = tmp_path / "report.html"
    assert main(["report", str(place), "-o", str(out), "--title", EVIL]) == 0
    text = out.read_text()
    assert "onerror=alert(1)" in text  # it is there, as text
    assert "<img" not in text
    assert "<script>alert" not in text
    assert text.count("</script>") == 3
    assert "\\u003cimg" in text or "&lt;img" in text


def test_names_are_escaped_in_the_model_card_and_the_terminal(tmp_path, capsys):
    folder = tmp_path / "photos"
    names = ["<b>bold", "[link](javascript:alert(1))", "[/red] \x1b[31mred", "a|b`c"]
    for name in names:
        (folder / name.replace("/", "\u2215")).mkdir(parents=True)
        for number in range(8):
            Image.effect_noise((8, 8), 90).save(folder / name.replace("/", "\u2215") / f"{number}.png")
    out = tmp_path / "run [/bold] <i>"
    words = [
        "--data",
        f"folder:{folder}",
        "--model",
        "resnet8",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--out",
        str(out),
    ]
    assert main(["train", "okddip", *words]) == 0
    assert main(["evaluate", str(out), "--per-class"]) == 0
    said = capsys.readouterr().out
    assert "<b>bold" in said
    assert "[link](javascript:alert(1))" in said
    assert "\x1b[31mred" not in said
    student = tmp_path / "a`b\n\n<u>.safetensors"
    assert main(["export", str(out), "--out", str(student)]) == 0
    card = student.with_suffix(".md").read_text().split("---", 2)[2]
    outside = re.sub(r"```.*?\n```\n|`[^`\n]+`", "", card, flags=re.DOTALL)  # what stands in code is shown as it is
    for part in ("<b>", "<u>", "[link](", "\x1b"):
        assert part not in outside
    assert "&lt;b&gt;bold" in card
    assert escape_markdown("[x](y)\n# z") == "\\[x\\](y) \\# z"


HOSTILE = '=HYPERLINK("http://x") \x1b[31m\x9b31m\u202e'


@pytest.fixture(scope="module")
def hostile_run(run, tmp_path_factory):
    """A run whose data set and classes have names that spreadsheets and terminals would obey."""
    place = tmp_path_factory.mktemp("hostile") / "run"
    shutil.copytree(run, place)
    info = read_json(place / "data.json")
    write_json(place / "data.json", info | {"classes": [f"{HOSTILE}{c}" for c in range(10)]})
    return place


def obeyed(text: str) -> list[str]:
    """The characters of a text that a terminal might obey."""
    return [c for c in text if not c.isprintable() and c != "\n"]


@pytest.mark.parametrize("json_output", [False, True])
def test_names_in_predictions_are_harmless(json_output, hostile_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("image.png")
    Path("image.png").rename("=cmd|calc\x1b]0;x\x07.png")
    words = ["predict", str(hostile_run), "=cmd|calc\x1b]0;x\x07.png", "--top", "2"] + ["--json"] * json_output
    assert main(words) == 0
    said = capsys.readouterr().out
    assert not obeyed(said)
    if json_output:
        (row,) = json.loads(said)
        assert row["file"] == "=cmd|calc\x1b]0;x\x07.png"
        assert row["top"][0]["class"].startswith(HOSTILE)
    else:
        _, cells = csv.reader(io.StringIO(said))
        assert cells[0].startswith("'=cmd|calc ")
        assert cells[1].startswith("'=HYPERLINK")


def test_class_names_in_a_confusion_matrix_are_harmless(tmp_path):
    write_confusion(tmp_path / "c.csv", [[1, 0], [0, 2]], [HOSTILE, "\t+1+cmd"])
    text = (tmp_path / "c.csv").read_text()
    assert not obeyed(text)
    rows = [*csv.reader(io.StringIO(text))]
    assert rows[0][1].startswith("'=HYPERLINK")
    assert [rows[2][0], *rows[2][1:]] == ["' +1+cmd", "0", "2"]


def test_no_cell_begins_at_a_semicolon_in_the_middle_of_a_name():
    """Where the decimal sign is a comma, spreadsheets split the lines of a CSV file at semicolons."""
    assert comma_separated([{"a;@x": "b; =cmd()", "c": "1;2"}]) == "a;'@x,c\nb; '=cmd(),1;2\n"


def test_names_in_the_tables_of_grids_are_harmless(tmp_path):
    config = CompareConfig(method="dml", data=f"folder:{EVIL}\u202e")
    write_comparison([], config, tmp_path, [{"peers": EVIL}], [f"1. {EVIL}", f"- {EVIL}"])
    text = (tmp_path / "table.md").read_text()
    assert not obeyed(text)
    assert "<img" not in text
    assert "[b]" not in text.replace("\\[b\\]", "")
    assert "\n1\\. " in text
    assert "\n\\- " in text


def test_a_report_says_which_commands_run_other_code(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "plotly.offline", SimpleNamespace(get_plotlyjs=lambda: ""))
    place = tmp_path / "run \x1b[31m\u202e"
    shutil.copytree(run, place)
    config = read_json(place / "config.json")
    for model, count in (("os:system,command=<b>", 1), ("resnet8", 0)):
        write_json(place / "config.json", config | {"model": [model]})
        assert main(["report", str(place), "-o", str(tmp_path / "r.html")]) == 0
        text = (tmp_path / "r.html").read_text()
        assert text.count("Runs code that is not codistill's: os:system,command=&lt;b&gt;<") == count
        assert not obeyed(text)


def test_what_the_commands_print_holds_no_control_characters(capsys):
    out.print(f"run folder: {HOSTILE}", HOSTILE)
    table = new_table(HOSTILE)
    table.add_column("x")
    out.print(table)
    print_rows([{"a": HOSTILE, "b": "1"}], HOSTILE)
    reporter = RichReporter()
    reporter.begin([HOSTILE], 1, 1, 0)
    reporter.bar.stop()
    said = capsys.readouterr()
    assert "HYPERLINK" in said.out
    assert not obeyed(said.out + said.err)


def test_words_of_the_command_line_other_than_names_of_networks_allow_no_code(run, tmp_path, monkeypatch, capsys):
    """The name of the code is a file's, which the shell puts on the command line, or the run folder's own."""
    monkeypatch.chdir(tmp_path)
    name = "os:system,command=touch ran #.png"
    place = tmp_path / name.removesuffix(".png")
    for folder, model in ((tmp_path / "run", name), (place, place.name)):
        shutil.copytree(run, folder)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"model": [model]})
    Image.new("L", (8, 8)).save(name)
    for words in (["predict", "run", name], ["predict", place.name, name], ["evaluate", place.name],
                  ["export", place.name, "--out", "x.safetensors", "--license", place.name]):  # fmt: skip
        assert "names code to import and run" in one_sentence(capsys, words)
    assert not Path("ran").exists()


def test_a_file_called_like_the_option_allows_no_code(run, tmp_path, monkeypatch, capsys):
    """A wildcard puts the names of files on the command line; after `--` none of them is an option."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "forged")
    write_json(Path("forged/config.json"), read_json(Path("forged/config.json")) | {"model": ["os:abort"]})
    Image.new("L", (8, 8)).save("a.png")
    Path("--allow-import").touch()
    assert "a wildcard may have put this option there" in one_sentence(
        capsys, ["predict", "forged", *sorted(os.listdir())]
    )
    assert "names code to import and run" in one_sentence(
        capsys, ["predict", "forged", "--", "--allow-import", "a.png"]
    )
    Path("--traceback").touch()
    assert main(["predict", str(run), "--", "--traceback", "a.png", "--allow-import"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "file",
        "'--traceback",
        "a.png",
        "'--allow-import",
    ]


@pytest.mark.parametrize(
    "name", ['a"b', "{x}", 'q"+__import__("os").abort()+"', "n\nimport os\nos.abort()\n", '"""', "a\\n"]
)
def test_the_name_of_an_exported_file_is_no_code_in_the_python_file_beside_it(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--out", f"{name}.safetensors"]) == 0
    model, about = runpy.run_path(f"{name}.py")["load"]()
    assert about["classes"] == [str(c) for c in range(10)]
    assert sum(p.numel() for p in model.parameters()) == 77_754


@pytest.mark.parametrize(
    "options",
    [
        {"data": "\x15touch ran\n", "out": "\x1b[201~; touch ran\n'"},
        {"data": "--x; touch ran #"},
        {"data": "--$(touch ran)", "weights": "-`touch ran`"},
        {"data_dir": "x\ntouch ran\n", "out": "--a'b; touch ran"},
        {"model": ("timm:x; touch ran #", "resnet8")},
    ],
)
def test_a_command_line_that_is_copied_runs_codistill_alone(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config("dml", **options)
    command = format_command(config)
    assert not obeyed(command)  # a pasted control character is a key: Ctrl-U clears the line before it
    script = tmp_path / "bin" / "codistill"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('words.json', 'w'))\n")
    script.chmod(0o755)
    subprocess.run(["bash", "-c", command], check=True, env={"PATH": f"{script.parent}:{os.environ['PATH']}"})
    assert not Path("ran").exists()
    words = json.loads(Path("words.json").read_text())
    assert parse("train", words[1:]).options == config


@pytest.mark.parametrize("where", ["file", "option"])
def test_kernels_of_the_hub_are_code(where, tmp_path, run, capsys):
    pytest.importorskip("transformers")
    folder, kernel = tmp_path / "net", "attn_implementation=owner/kernel"
    folder.mkdir()
    described = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    (folder / "config.json").write_text(json.dumps(described | {"_attn_implementation": "owner/kernel"}))
    if where == "file":
        with pytest.raises(InputError, match="names code to run, owner/kernel"):
            build(resolve(f"hf:{folder}"), num_classes=2, in_channels=3, image_size=8)
    else:
        shutil.copytree(run, tmp_path / "run")
        config = tmp_path / "run" / "config.json"
        write_json(config, read_json(config) | {"model": [f"hf:{folder},{kernel}"]})
        assert "names code to import and run" in one_sentence(capsys, ["evaluate", str(tmp_path / "run")])


def test_no_advice_of_a_library_to_load_without_the_check_is_repeated(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 2}))
    torch.save(Malicious(tmp_path / "ran"), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="asks for more than tensors and plain values"):
        build(resolve(f"timm:local-dir:{tmp_path}", pretrained=True), num_classes=2, in_channels=3, image_size=32)
    assert not (tmp_path / "ran").exists()


def test_a_given_image_that_a_program_would_draw_is_refused(monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    for lazy in (False, True):
        pairs = [(Image.open(io.BytesIO(eps)), number % 2) for number in range(4)]
        with pytest.raises(InputError, match="of the format EPS, which a program would draw"):
            ImageSet.from_dataset(pairs, lazy=lazy)
    assert not started


def test_code_of_a_transformers_folder_is_refused_without_a_question(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "net").mkdir()
    auto = {"AutoConfig": "code.C", "AutoModelForImageClassification": "code.M"}
    (tmp_path / "net" / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (tmp_path / "net" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot be built"):
        build(resolve(f"hf:{tmp_path / 'net'}"), num_classes=2, in_channels=3, image_size=8)
    assert not (tmp_path / "ran").exists()
