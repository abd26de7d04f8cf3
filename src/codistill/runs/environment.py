"""What a run ran on: versions, hardware, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill.config.config import Config


def environment(config: Config) -> dict[str, Any]:
    """Describe what the run ran on."""
    import torchvision

    from codistill import __version__

    return {
        "codistill": __version__,
        "git_commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _git_commit() -> str | None:
    """Return the commit of the checkout codistill runs from, with a `+` if it was changed; None outside one."""
    folder = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=5)  # noqa: E731
        commit = run("rev-parse", "HEAD")
        if commit.returncode:
            return None
        return commit.stdout.strip() + ("+" if run("status", "--porcelain", "-uno").stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None
