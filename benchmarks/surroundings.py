"""Run codistill where its surroundings fail: files, terminals, environments, starts of several processes, odd images.

    python benchmarks/surroundings.py [--only terminals] [--out FOLDER]

Every case is a real command. It is well if it ends within its time with an exit code that its row allows, prints no
traceback and no "bug", and passes the row's own check: what it has written can be read, the cursor is shown again.
What needs a mount is left out where this user may not mount. Needs Linux.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from codistill.utils.tables import markdown
from odd_images import make_file, mutate
from real_commands import CODISTILL, TRAIN, Case, run_case
from starts import STARTS, run_ranks
from terminals import TERMINALS, run_in_terminal


def may_mount() -> bool:
    """Return whether a mount namespace can be made and mounted in."""
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


# -- checks ------------------------------------------------------------------------------------------------------------


def is_readable(place: Path, _said: str) -> str | None:
    """Check that a run can be resumed where it stands, and ends."""
    words = [*TRAIN, "--epochs", "3", "--out", "r", "--resume", "auto"]
    done = subprocess.run([*CODISTILL, *words], cwd=place, capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else f"cannot be resumed: {done.stderr.strip()[-200:]}"


# -- the cases ---------------------------------------------------------------------------------------------------------


def file_systems(mounts: bool) -> list[Case]:
    """Return cases of full and read-only disks, limits on files, and a full standard output."""
    kind = "file systems"
    three = [*TRAIN, "--epochs", "3", "--out", "r"]
    cases = [
        Case(kind, "stdout is /dev/full, train", three, (0, 1), stdout="/dev/full", check=is_readable),
        Case(kind, "stdout is /dev/full, list", ["list", "methods"], (0, 1), stdout="/dev/full"),
    ]
    for kilobytes in (20, 200, 1_000):
        limits = {resource.RLIMIT_FSIZE: kilobytes * 1024}
        name = f"files of {kilobytes} KB at most, train"
        cases.append(Case(kind, name, three, (0, 1), limits=limits, check=is_readable))
    if mounts:
        for size in ("100k", "400k", "1m", "2400k"):
            mount = f"mkdir -p r && mount -t tmpfs -o size={size} none r"
            cases.append(Case(kind, f"a disk of {size}, train", three, (0, 1), mount=mount))
        mount = "mkdir -p r && mount --bind r r && mount -o remount,ro,bind r"
        cases.append(Case(kind, "a read-only disk, train", three, (1, 2), mount=mount))
        cases.append(
            Case(kind, "a read-only disk, export", ["export", "run", "--out", "r/s.onnx"], (1, 2), mount=mount)
        )
    return cases


def environments(mounts: bool) -> list[Case]:
    """Return cases of encodings, temporary folders, descriptors, shared memory and variables."""
    kind = "environments"
    files = [
        "train",
        "pcl",
        "--peers",
        "2",
        "--model",
        "resnet8",
        "--data",
        "folder:photos",
        "--data-pipeline",
        "files",
    ]
    files += ["--image-size", "64", "--batch-size", "8", "--epochs", "1", "--device", "cpu", "--data-workers", "2"]
    deep = "t" * 100 + "/" + "u" * 100
    cases = [
        Case(kind, f"output in {encoding}", words, (0,), env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
        for encoding in ("ascii", "cp1252", "utf-16", "latin-1:strict")
        for words in ([*files, "--out", "r"], ["predict", "run", "photos/train/kühe/0.png"], ["report", "run"])
    ]
    cases += [
        Case(kind, "a TMPDIR of 200 letters", [*files, "--out", "r"], (0,), env={"TMPDIR": deep}),
        Case(kind, "a TMPDIR that is missing", [*files, "--out", "r"], (0, 2), env={"TMPDIR": "gone"}),
        Case(kind, "64 descriptors", [*files, "--out", "r"], (0, 1, 2), limits={resource.RLIMIT_NOFILE: 64}),
        Case(kind, "24 descriptors", [*files, "--out", "r"], (0, 1, 2), limits={resource.RLIMIT_NOFILE: 24}),
        Case(kind, "LC_ALL=C", [*files, "--out", "r"], (0,), env={"LC_ALL": "C", "LANG": "C"}),
        Case(kind, "python -W error", [*TRAIN, "--epochs", "1", "--out", "r"], (0,), env={"PYTHONWARNINGS": "error"}),
        Case(kind, "HOME is missing", [*TRAIN, "--epochs", "1", "--out", "r"], (0,), env={"HOME": "/gone"}),
        Case(kind, "COLUMNS=0", [*TRAIN, "--epochs", "1", "--out", "r"], (0,), env={"COLUMNS": "0"}),
    ]
    for variables in ({"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "0", "WORLD_SIZE": "-2"}, {"LOCAL_WORLD_SIZE": "0"}):
        name = ", ".join(f"{key}={value}" for key, value in variables.items())
        cases.append(Case(kind, name, [*TRAIN, "--epochs", "1", "--out", "r"], (0, 2), env=variables))
    if mounts:
        for size in ("64k", "1m", "8m"):
            mount = f"mount -t tmpfs -o size={size} none /dev/shm"
            cases.append(Case(kind, f"/dev/shm of {size}", [*files, "--out", "r"], (0, 2), mount=mount))
    return cases


def images(count: int) -> list[Case]:
    """Return cases of mutated images, as the only unusual one of a folder and in predict."""
    rng, kind, cases = np.random.default_rng(1), "images", []
    formats = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
    for number in range(count):
        image_format = formats[number % len(formats)]
        content = mutate(make_file(image_format, "RGB", rng), rng)
        name = f"odd{number}.{image_format.lower()}"
        train = ["train", "independent", "--peers", "1", "--model", "resnet8", "--data", "folder:photos", "--epochs"]
        train += ["1", "--image-size", "32", "--batch-size", "4", "--device", "cpu", "--out", "r"]
        words = train if number % 2 else ["predict", "run", name]
        cases.append(Case(kind, f"{words[0]}: {name}", words, (0, 2), env={"ODD": name, "ODD_BYTES": content.hex()}))
    return cases


# -- all ---------------------------------------------------------------------------------------------------------------


def prepare(place: Path, case: Case | None, originals: Path) -> None:
    """Fill a case's folder: a trained run, photographs with names of other alphabets, and the case's odd image."""
    for name in ("run", "photos"):
        shutil.copytree(originals / name, place / name)
    (place / ("t" * 100) / ("u" * 100)).mkdir(parents=True)
    if case is not None and "ODD" in case.env:
        target = place / ("photos/train/kühe" if case.words[0] == "train" else ".") / case.env["ODD"]
        target.write_bytes(bytes.fromhex(case.env.pop("ODD_BYTES")))


def make_originals(place: Path) -> None:
    """Train the run and make the photographs that cases use."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for name in ("kühe", "日本"):
            folder = place / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    words = ["train", "independent", "--peers", "1", "--model", "resnet8", "--data", "folder:photos", "--image-size"]
    words += ["32", "--batch-size", "8", "--epochs", "1", "--device", "cpu", "--out", "run"]
    subprocess.run([*CODISTILL, *words], cwd=place, check=True, capture_output=True)


def run_all(only: str | None, count: int, out: Path) -> list[dict[str, str]]:
    """Run the cases; return a row for each kind."""
    originals = out / "originals"
    make_originals(originals)
    mounts = may_mount()
    if not mounts:
        print("this user may not mount: small disks, read-only disks and small shared memory are left out", flush=True)
    jobs: list[tuple[str, str, Case | None, Callable[[Path], str]]] = []
    for case in [*file_systems(mounts), *environments(mounts), *images(count)]:
        jobs.append((case.kind, case.name, case, lambda place, case=case: run_case(case, place)))
    for name, words, sent, codes in TERMINALS:
        jobs.append(("terminals", name, None, lambda p, w=words, s=sent, c=codes: run_in_terminal(w, s, c, p)))
    for name, ranks, codes, taken in STARTS:
        jobs.append(("starts", name, None, lambda p, r=ranks, c=codes, t=taken: run_ranks(r, c, p, t)))
    rows: dict[str, list[float]] = {}
    for kind, name, case, run in jobs:
        if only is not None and kind != only:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=out) as folder:
            prepare(Path(folder), case, originals)
            wrong = run(Path(folder))
        row = rows.setdefault(kind, [0, 0, 0.0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + bool(wrong), max(row[2], time.monotonic() - began)
        if wrong:
            print(f"{kind}, {name}: {wrong}", flush=True)
    return [
        {"what": kind, "cases": f"{n:.0f}", "badly ended": f"{bad:.0f}", "slowest, s": f"{slowest:.0f}"}
        for kind, (n, bad, slowest) in rows.items()
    ]


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["file systems", "environments", "images", "terminals", "starts"])
    parser.add_argument("--images", type=int, default=42, help="mutated images")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        rows = run_all(options.only, options.images, Path(folder))
    print(markdown(rows))
    return int(any(row["badly ended"] != "0" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
