"""The examples run as they are, on embedded digits, and learn."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
ACCURACIES = {  # far below what each printed when it was written, far above chance (10 %)
    "ten_lines": 70,
    "torchvision_branches": 0,  # three epochs of a large network on 100 digits: it runs, and learns little
    "unequal_peers": 30,
    "mean_teachers": 60,
    "own_method": 50,
    "tabular": 80,
    "with_lightning": 70,
    "with_timm": 60,
    "with_transformers": 80,
    "text": 80,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_examples_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*ACCURACIES, "folder_to_onnx"}


def test_the_notebook_is_current():
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    expected = jupytext.read(EXAMPLES / "ten_lines.py")
    notebook = nbformat.read(EXAMPLES / "ten_lines.ipynb", as_version=4)
    said = "run: jupytext --to ipynb examples/ten_lines.py"
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in expected.cells], said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the distillation weight", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ACCURACIES)
def test_an_example_learns(name, folder, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    accuracies = [float(figure) for figure in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert accuracies
    assert all(ACCURACIES[name] <= accuracy <= 100 for accuracy in accuracies)


@pytest.mark.slow
def test_the_folder_becomes_a_file_that_runs_without_codistill(folder, capsys):
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    runpy.run_path(str(EXAMPLES / "folder_to_onnx.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "'logits': ['batch', 10]" in said
    page = (EXAMPLES.parent / "docs" / "howto" / "deploy.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "deploy.md", "exec"), {})  # it reads the file that the example has written
    assert re.search(r"^class-\d$", capsys.readouterr().out, re.MULTILINE)
