"""The environment of a run: versions, hardware, git commit, command."""

from __future__ import annotations

import os
import platform
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
        "git_commit": _find_git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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


def _find_git_commit() -> str | None:
    """Return the commit of the checkout that codistill runs from, with `+` if it has changes; None outside one."""
    try:
        commit = _run_git("rev-parse", "HEAD")
        if commit.returncode:
            return None
        return commit.stdout.strip() + ("+" if _run_git("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
