"""Check the wheel and the sdist in a folder: they hold every file, and the wheel works where it alone is installed.

    python benchmarks/check_release.py FOLDER

The wheel is installed without its dependencies into a folder of its own, which comes first on the path: torch and the
others are those of this environment, codistill is the wheel's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = "train okddip --model resnet8 --data digits --train-per-class 6 --epochs 1 --batch-size 16 --out run"
COMMANDS = ["--version", "list methods", TRAIN, "evaluate run", "export run --out student.safetensors"]


def tracked_files() -> set[str]:
    """Return the files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def missing_from_wheel(wheel: Path) -> set[str]:
    """Return the files of the package that the wheel lacks."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("src/") for name in tracked_files() if name.startswith("src/codistill/")}
    assert package
    return package - names


def missing_from_sdist(sdist: Path) -> set[str]:
    """Return the files of the repository that the sdist lacks, but for those that configure git alone."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return {name for name in tracked_files() - names if not name.startswith(".git")}


def use_wheel(wheel: Path) -> None:
    """Install the wheel into a temporary folder, and run commands with it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "installed"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(install, check=True)
        environment = os.environ | {"PYTHONPATH": str(target)}
        place = "import codistill; print(codistill.__file__)"
        where = subprocess.run(
            [sys.executable, "-c", place], cwd=folder, env=environment, check=True, capture_output=True, text=True
        )
        if not where.stdout.startswith(str(target)):
            raise SystemExit(f"imported {where.stdout.strip()}, not the wheel's")
        for words in COMMANDS:
            command = [sys.executable, "-m", "codistill", *words.split()]
            subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Check the one wheel and the one sdist of the folder."""
    (wheel,), (sdist,) = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
    for archive, missing in ((wheel, missing_from_wheel(wheel)), (sdist, missing_from_sdist(sdist))):
        if missing:
            raise SystemExit(f"{archive.name} lacks {', '.join(sorted(missing))}")
    use_wheel(wheel)
    print(f"{wheel.name} and {sdist.name} hold every file; the installed wheel trains, evaluates and exports")


if __name__ == "__main__":
    main()
