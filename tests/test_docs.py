"""The README is true: its Python runs, and every command in it parses."""

import doctest
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import codistill as cd
from codistill.cli.options import COMMANDS, parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return [b for page in PAGES for b in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_in_the_documents_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {})


def commands() -> list[str]:
    joined = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in joined if line.startswith("codistill ")]


@pytest.mark.parametrize("line", commands())
def test_commands_in_the_documents_parse(line, tmp_path, monkeypatch):
    words = shlex.split(line, comments=True)[1:]
    assert words[0] in COMMANDS
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        from codistill.config.config import Config
        from codistill.utils.files import write_json

        place = Path(words[words.index("--config") + 1])
        write_json(place if place.suffix else place / "config.json", Config().resolved().to_dict())
    parse(words[0], words[1:])


def test_no_command_in_the_documents_is_left_untried():
    for page in PAGES:
        for language, block in re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            untried = language != "sh" and re.search("^codistill (train|compare|reproduce) ", block, re.MULTILINE)
            assert not untried, (page, block)


def test_files_that_the_documents_name_exist():
    pages = [*PAGES, ROOT / "benchmarks" / "RESULTS.md", ROOT / "CONTRIBUTING.md"]
    named = {name for page in pages for name in re.findall(r"\b(?:tests|src|examples)/[\w/]+\.py\b", page.read_text())}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


SOURCES = [path for path in sorted((ROOT / "src").rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize(
    "path", SOURCES, ids=lambda path: ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
)
def test_the_examples_of_a_module_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(".".join(path.relative_to(ROOT / "src").with_suffix("").parts))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


PUBLIC = {  # what CONTRIBUTING.md names, with what the pages on trainers and other inputs use
    "codistill": cd.__all__,
    "codistill.losses": cd.losses.__all__,
    "codistill.methods": [name for name in dir(cd.methods) if not name.startswith("_") and name != "lazy_names"],
    "codistill.metrics": ["PeerMetrics"],
    "codistill.evaluation": ["evaluate_peers", "score_network"],
    "codistill.training": ["PeerTraining"],
    "codistill.integrations": ["PeerModule", "PeerTask", "PeerTrainer"],
}


def public_values() -> dict[str, object]:
    """Return every public class and function by its path."""
    values = {
        f"{path}.{name}": getattr(importlib.import_module(path), name)
        for path, names in PUBLIC.items()
        for name in names
    }
    return {name: value for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value)}


def test_every_public_name_has_an_example():
    assert len(public_values()) > 50
    assert [name for name, value in public_values().items() if ">>> " not in (value.__doc__ or "")] == []


def test_every_public_name_is_in_the_api_reference():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    whole = re.findall(r"automodule:: (\S+)", pages)
    named = set(re.findall(r"auto(?:class|function|exception):: (\S+)", pages))
    missing = [name for name, value in public_values().items() if name not in named and value.__module__ not in whole]
    assert missing == []


@pytest.mark.slow
def test_the_six_commands_of_okddips_repository_run(tmp_path, monkeypatch):
    from codistill.cli.main import main

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "okddip-commands.md").read_text()
    lines = [b.replace("\\\n", " ") for b in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    runs = [line for block in lines for line in block.splitlines()]
    assert len(runs) == 9
    small = ["--data", "digits", "--train-per-class", "6", "--batch-size", "16", "--epochs", "2"]
    for line in runs:
        words = shlex.split(line)[1:]
        for flag, value in (("--data", "digits"), ("--model", "resnet8")):
            words[words.index(flag) + 1] = value
        assert main([*words, *small[2:]]) == 0, line
