"""Completion: what is offered where, and the script in a real shell."""

import os
import shutil
import subprocess
import sys

import pytest

from codistill.cli.completion import MODELS, SCRIPTS, complete
from codistill.cli.main import main
from codistill.cli.options import COMMANDS
from codistill.config import METHODS
from codistill.models.registry import MODELS as BUILT_IN


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["train", "okd"], ["okddip", "okdph"]),
        (["train", "okddip", "--method.v"], ["--method.variant"]),
        (["train", "okddip", "--method.variant", ""], ["paper", "okddip_code"]),
        (["train", "okddip", "--schedule", "c"], ["cosine"]),
        (["train", "okddip", "--topology", ""], ["networks", "branches", "twins"]),
        (["train", "okddip", "--recipe", ""], ["auto", "paper"]),
        (["train", "okddip", "--no-augm"], ["--no-augment"]),
        (["train", "okddip", "--model", "wrn16"], ["wrn16_2"]),
        (["compare", "okddip", "okd"], ["okdph"]),
        (["reproduce", "okddip_table2"], ["okddip_table2"]),
        (["reproduce", "okddip_table2", "--scale", "s"], ["smoke", "short"]),
        (["list", "t"], ["tables"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["evaluate", "runs/"], []),
        (["train", "okddip", "--out", ""], []),
        (["nothing", ""], []),
    ],
)
def test_what_is_offered(words, expected):
    assert complete(words) == expected


def test_every_command_method_and_network_is_offered():
    assert {*COMMANDS} <= {*complete([""])}
    assert complete(["train", ""]) == [*METHODS]
    assert {name for name in MODELS if not name.endswith(":")} == {*BUILT_IN}
    for command in COMMANDS:
        assert "--help" in complete([command, "--"])


def run_shell(shell, script, tmp_path):
    (tmp_path / "codistill").write_text(f'#!/bin/sh\nexec {sys.executable} -m codistill "$@"\n')
    (tmp_path / "codistill").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_the_script_completes_in_bash(tmp_path):
    script = f"""{SCRIPTS["bash"]}
COMP_WORDS=(codistill train okddip --optim) COMP_CWORD=3
_codistill
echo "${{COMPREPLY[@]}}"
complete -p codistill >/dev/null"""
    assert run_shell("bash", script, tmp_path) == ["--optimizer"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish on this machine")
def test_the_script_completes_in_fish(tmp_path):
    script = SCRIPTS["fish"] + "complete -C 'codistill train okddip --optim'"
    assert run_shell("fish", script, tmp_path) == ["--optimizer"]


def test_the_scripts_are_printed_and_an_unknown_shell_is_refused(capsys):
    for shell, script in SCRIPTS.items():
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == script
    assert main(["completion", "csh"]) == 2
    assert 'no script for "csh"; there are bash, zsh, fish' in capsys.readouterr().err
