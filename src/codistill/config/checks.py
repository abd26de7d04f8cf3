"""What a config must fulfil, before anything is built: ranges, and options that contradict each other.

The standard library alone, as `config.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from codistill.config.methods import MethodConfig
from codistill.utils.errors import InputError

if TYPE_CHECKING:
    from codistill.config.config import Config

LARGEST = 2**31


def check_numbers(c: Config) -> None:
    """Raise for a number out of its range, naming the flag."""
    for part, prefix in ((c, ""), (c.method, "method.")):
        for name, value in vars(part).items():
            if any(isinstance(v, int) and abs(v) >= LARGEST for v in (value if isinstance(value, tuple) else [value])):
                raise InputError(f"--{prefix}{name.replace('_', '-')} is out of all range; give a number below 2^31")
    least_one = (
        *("epochs", "batch_size", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs"),
        *("keep_checkpoints", "accumulate"),
    )
    rules = [(n, getattr(c, n) >= 1, "at least 1") for n in least_one]
    rules += [
        ("train_per_class", c.train_per_class is None or c.train_per_class >= 1, "at least 1"),
        ("image_size", c.image_size is None or c.image_size >= 8, "at least 8"),
        ("lr_base_batch", c.lr_base_batch is None or c.lr_base_batch >= 1, "at least 1"),
        ("peers", c.peers is None or c.peers >= 1, "at least 1"),
        ("lr", math.isfinite(c.lr) and c.lr > 0, "a number above 0"),
        ("momentum", 0 <= c.momentum < 1, "from 0 to below 1"),
        ("weight_decay", math.isfinite(c.weight_decay) and c.weight_decay >= 0, "0 or more"),
        ("warmup_epochs", math.isfinite(c.warmup_epochs) and c.warmup_epochs >= 0, "0 or more"),
        ("val_fraction", 0 <= c.val_fraction < 1, "from 0 to below 1"),
        ("cutout", c.cutout >= 0, "0 or more"),
        ("data_workers", c.data_workers is None or c.data_workers >= 0, "0 or more"),
        ("head_lr", math.isfinite(c.head_lr) and c.head_lr > 0, "a number above 0"),
        ("label_smoothing", 0 <= c.label_smoothing < 1, "from 0 to below 1"),
        ("mixup", math.isfinite(c.mixup) and c.mixup >= 0, "0 or more"),
        ("cutmix", math.isfinite(c.cutmix) and c.cutmix >= 0, "0 or more"),
        ("checkpoint_every_steps", c.checkpoint_every_steps >= 0, "0 or more"),
        ("skip_nonfinite", c.skip_nonfinite >= 0, "0 or more"),
        ("seed", 0 <= c.seed < 2**31, "from 0 to 2147483647"),
        ("collective_timeout", math.isfinite(c.collective_timeout) and c.collective_timeout >= 1, "1 second or more"),
        ("milestones", all(m >= 1 for m in c.milestones or ()), "1 or more, each"),
        ("fan_out", all(f >= 1 for f in c.fan_out), "1 or more, each"),
    ]
    method = c.method
    for name, fine, words in (
        ("temperature", lambda v: v is None or (math.isfinite(v) and v > 0), "a number above 0"),
        ("weight", lambda v: math.isfinite(v) and v >= 0, "0 or more"),
        ("ramp_epochs", lambda v: v is None or (math.isfinite(v) and v >= 0), "0 or more"),
        ("entropy_weight", math.isfinite, "a number"),
        ("alpha", lambda v: v is None or 0 <= v <= 1, "from 0 to 1"),
        ("beta", lambda v: 0 <= v <= 1, "from 0 to 1"),
        ("ema_decay", lambda v: 0 <= v < 1, "from 0 to below 1"),
        ("holdout_fraction", lambda v: 0 < v < 1, "a number between 0 and 1"),
    ):
        if hasattr(method, name):
            rules.append((f"method.{name}", fine(getattr(method, name)), words))
    for name, fine, words in rules:
        if not fine:
            value = getattr(method, name[7:]) if name.startswith("method.") else getattr(c, name)
            raise InputError(f"--{name.replace('_', '-')} is {value}; give {words}")
    parse_normalise(c.normalise)
    soft = [flag for flag in ("label_smoothing", "mixup", "cutmix") if getattr(c, flag)]
    target = getattr(method, "target", None) if getattr(method, "name", None) == "kdcl" else None
    if soft and target in ("naive", "linear", "minlogit"):
        raise InputError(
            f"--{soft[0].replace('_', '-')} makes labels soft, and kdcl's {target} target reads one hard label each; "
            "drop it, or give --method.target general"
        )
    if c.optimizer == "sgd" and c.nesterov and c.momentum == 0:
        raise InputError("--nesterov needs a momentum; give --momentum above 0, or --no-nesterov")


def check_peers(c: Config, method: MethodConfig) -> None:
    """Raise where peers, models, topology and method contradict each other."""
    assert c.peers is not None
    if c.topology not in method.topologies:
        raise InputError(f"{method.name} needs a trunk, so it works on branches only; drop --topology {c.topology}")
    if c.peers < method.min_peers:
        what = " (auxiliary peers and the leader)" if method.name == "okddip" else ""
        raise InputError(f"--peers is {c.peers}; {method.name} needs at least {method.min_peers}{what}")
    numbers = [str(p) for p in range(c.peers)]
    if c.deploy not in ("member", "ensemble", "ema", *numbers):
        raise InputError(f"--deploy {c.deploy}: give member, ensemble, ema, or a number from 0 to {c.peers - 1}")
    if c.deploy == "ema" and method.name != "pcl":
        raise InputError(f"--deploy ema: {method.name} keeps no mean teachers; pcl does")
    if len(c.model) > 1 and len(c.model) != c.peers:
        raise InputError(f"--model is given {len(c.model)} times for --peers {c.peers}; give one, or one a peer")
    if c.topology == "branches":
        if len(c.model) > 1:
            raise InputError("--topology branches takes one --model: branches share a trunk; use --topology networks")
        if getattr(method, "update", None) == "alternating":
            raise InputError("--method.update alternating steps one network at a time; branches share a trunk, drop it")
    elif c.branch_at or c.fan_out:
        raise InputError("--branch-at and --fan-out shape branches; add --topology branches")
    if c.checkpoint_activations and (c.topology == "branches" or c.execution == "stacked"):
        why = "branches share a trunk" if c.topology == "branches" else "--execution stacked runs them as one"
        raise InputError(f"--checkpoint-activations runs each network again by itself, but {why}; drop one of the two")
    if c.fan_out and math.prod(c.fan_out) != c.peers:
        raise InputError(
            f"--fan-out {' '.join(map(str, c.fan_out))} makes {math.prod(c.fan_out)} branches, not --peers {c.peers}"
        )
    if len(c.branch_at) > 1 and len(c.fan_out) != len(c.branch_at):
        raise InputError("--fan-out needs one number for each --branch-at")


def parse_normalise(rule: str | None) -> str | tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return imagenet, dataset, or (means, deviations) out of `M,M,M,S,S,S`; None where nothing is said.

    Raises:
        InputError: the text is something else.

    >>> parse_normalise("0.5,0.25")
    ((0.5,), (0.25,))
    """
    if rule in (None, "imagenet", "dataset"):
        return rule
    try:
        numbers = tuple(float(part) for part in rule.split(","))
    except ValueError:
        numbers = ()
    half = len(numbers) // 2
    if len(numbers) not in (2, 6) or not all(map(math.isfinite, numbers)) or min(numbers[half:]) <= 0:
        raise InputError(
            f"--normalise {rule}: give imagenet, dataset, or means and deviations of pixels / 255 with commas, as in "
            "0.5,0.5,0.5,0.25,0.25,0.25"
        )
    return numbers[:half], numbers[half:]


def mesh_shape(mesh: str | None) -> tuple[int, int]:
    """Return (D, P) of `data=D,peer=P`; an axis that is not named has one process.

    Raises:
        InputError: the text is something else.

    >>> mesh_shape("data=2,peer=4")
    (2, 4)
    """
    sizes = {"data": 1, "peer": 1}
    named: set[str] = set()
    for part in (mesh or "").split(",") if mesh is not None else []:
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or axis in named or not size.isdecimal() or int(size) < 1:
            raise InputError(f'--mesh {mesh}: "{part}" is no axis; give data=D,peer=P with numbers of processes')
        named.add(axis)
        sizes[axis] = int(size)
    return sizes["data"], sizes["peer"]


def check_mesh(c: Config) -> None:
    """Raise where the mesh does not fit the peers or the batch."""
    data, peer = mesh_shape(c.mesh)
    assert c.peers is not None
    if peer > 1 and c.topology == "branches":
        raise InputError(
            f"--mesh {c.mesh}: branches share a trunk, so they cannot be spread over the axis peer; "
            f"give --mesh data={data * peer}, or --topology networks"
        )
    if c.peers % peer:
        raise InputError(
            f"--mesh {c.mesh}: {c.peers} peers cannot be shared out evenly among {peer} processes; "
            f"give a peer=P that divides {c.peers}, or other --peers"
        )
    if data * peer > 1 and c.execution == "stacked":
        raise InputError("--execution stacked runs the peers as one network in one process; drop it, or --mesh")
    if data * c.accumulate > c.batch_size:
        flag, what = f"--mesh {c.mesh}", "processes"
        if c.accumulate > 1:
            flag, what = f"--accumulate {c.accumulate}", "parts"
        raise InputError(f"{flag}: --batch-size {c.batch_size} leaves {what} without samples; raise it")
    if c.accumulate > 1 and c.sync_bn and data > 1:
        raise InputError("--sync-bn normalises by the whole batch, --accumulate never holds it; drop one of the two")
