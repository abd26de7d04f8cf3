"""The environment of a run: versions, hardware, git commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def describe_environment() -> dict[str, Any]:
    """Return what environment.json holds."""
    from codistill import __version__

    return {
        "codistill": __version__,
        "git_commit": _find_own_commit(),
        "user_git_commit": _find_user_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),  # importing it takes a second
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _find_own_commit() -> str | None:
    """Return the commit of the checkout that codistill runs from, with `+` if it has changes; None outside one."""
    own = Path(__file__)
    tracked = _run_git(own.parent, "ls-files", "--error-unmatch", own.name)  # not so in a .venv inside another project
    return _find_commit(own.parent) if tracked is not None else None


def _find_user_commit() -> str | None:
    """Return the commit of the checkout around the working folder; None outside one, and in codistill's own."""
    top = _run_git(Path.cwd(), "rev-parse", "--show-toplevel")
    return None if top is None or Path(top) in Path(__file__).resolve().parents[1:4] else _find_commit(Path.cwd())


def _find_commit(folder: Path) -> str | None:
    commit = _run_git(folder, "rev-parse", "HEAD")
    if commit is None or _has_filters(folder):
        return commit
    changes = _run_git(folder, "status", "--porcelain", "-uno", "--ignore-submodules=all")
    return commit + ("+" if changes else "")


def _has_filters(folder: Path) -> bool:
    """Return whether a checkout itself configures programs that `git status` would run over its files.

    A downloaded folder may be a checkout; filters of the user's own configuration (Git LFS) are no danger.
    """
    found = _run_git(folder, "config", "--show-scope", "--get-regexp", r"^filter\..*\.(clean|process)$")
    return any(line.split()[0] not in ("system", "global") for line in (found or "").splitlines())


def _run_git(folder: Path, *words: str) -> str | None:
    """Return what git prints in a folder, None where it fails or is not installed; no program of the folder is run."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", *words]
    # No index is written (which runs a hook), and nothing is fetched (a partial clone names what to run for that).
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False, env=env)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return None if done.returncode else done.stdout.strip()
