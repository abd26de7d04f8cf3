"""CPU time of whole commands, beside another checkout's and beside torch's own start.

    git worktree add ../before 844e2fa
    OMP_NUM_THREADS=1 python benchmarks/commands.py --against ../before/src [--rounds 5]

The reference is a process that imports torch and does one SGD step on a tensor. Every round runs the reference and then
every command with either checkout, in turn; times are CPU times of the process and its children, user and system.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from codistill.utils.tables import markdown

REFERENCE = (
    "import torch; w = torch.ones(3, requires_grad=True); o = torch.optim.SGD([w], 0.1); w.sum().backward(); o.step()"
)
DIGITS = "--data digits --model resnet8 --device cpu"
COMMANDS = {
    "train, one plain network, 1 epoch": f"train independent --peers 1 {DIGITS} --epochs 1 --out {{out}}",
    "evaluate": "evaluate {run}",
    "predict": "predict {run} {image}",
    "export": "export {run} --format safetensors --out {out}/student.safetensors",
    "train, 4 peers, 25 a batch, 60 epochs": (
        f"train okddip --topology networks --peers 4 {DIGITS} --epochs 60 --batch-size 25 --lr 0.05 "
        "--train-per-class 10 --eval-every-epochs 60 --checkpoint-every-epochs 60 --out {out}"
    ),
    "a grid of 8 runs, 2 workers": "reproduce okddip_table2 --scale smoke --seeds 1 --workers 2 --out {out}",
}


def cpu_seconds(arguments: list[str], source: Path | None) -> float:
    """Run Python with these arguments and return its CPU seconds, those of its children included.

    Raises:
        SystemExit: it failed; its last words are shown.
    """
    environment = os.environ | ({"PYTHONPATH": str(source)} if source else {})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def make_inputs(folder: Path, source: Path) -> dict[str, str]:
    """Train a small run and write an image with a checkout; return the words that commands use for them."""
    from PIL import Image

    run, image = folder / source.parent.name / "run", folder / "image.png"
    cpu_seconds(["-m", "codistill", *COMMANDS["train, one plain network, 1 epoch"].format(out=run).split()], source)
    Image.new("L", (8, 8), 128).save(image)
    return {"run": str(run), "image": str(image)}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="src folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sources = Path(__file__).resolve().parents[1] / "src", options.against.resolve()
    times: dict[tuple[str, Path], list[float]] = {(name, source): [] for name in COMMANDS for source in sources}
    references = []
    with tempfile.TemporaryDirectory() as name:
        words = {source: make_inputs(Path(name), source) for source in sources}
        for number in range(options.rounds):
            references.append(cpu_seconds(["-c", REFERENCE], None))
            for (command, source), found in times.items():
                out = Path(name) / f"out{number}-{len(found)}-{source.parent.name}-{len(command)}"
                filled = COMMANDS[command].format(out=out, **words[source])
                out.mkdir() if "{out}/" in COMMANDS[command] else None
                found.append(cpu_seconds(["-m", "codistill", *filled.split()], source))
    rows = []
    for command in COMMANDS:
        ours, theirs = (times[command, source] for source in sources)
        rows.append(
            {
                "command": command,
                "CPU s": f"{median(ours):.2f}",
                "before": f"{median(theirs):.2f}",
                "before / now": f"{median(b / a for a, b in zip(ours, theirs)):.2f}",
                "times the reference": f"{median(a / r for a, r in zip(ours, references)):.2f}",
            }
        )
    print(f"reference: {median(references):.2f} s; n = {options.rounds} rounds\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
