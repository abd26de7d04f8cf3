"""Checks of options against each other, before anything is built."""

from __future__ import annotations

import math

from codistill.config.options import Options
from codistill.config.ranges import LIMIT, check_ranges
from codistill.utils import InputError

MAX_PEERS = 1_000


def check_options(options: Options) -> None:
    """Check everything that does not depend on the number of peers.

    Raises:
        InputError: a value is out of range or cannot be read, or two options contradict each other.
    """
    if not options.model:
        raise InputError("--model names no network; give one, as in --model resnet32")
    if "\0" in (options.out or ""):
        raise InputError("--out contains a null character, which no folder's name can; give another")
    check_ranges(options)
    check_ranges(options.method, "method.")
    parse_normalize(options.normalize)
    _check_sampler(options)
    if options.optimizer == "sgd" and options.nesterov and options.momentum == 0:
        raise InputError("--nesterov needs a momentum; give --momentum above 0, or --no-nesterov")


def _check_sampler(options: Options) -> None:
    count = images_per_class(options.sampler)
    if count and options.balanced_sampling:
        raise InputError(
            f"--balanced-sampling and --sampler {options.sampler} both choose the images of a batch; drop one of the "
            "two (pairs draws all classes equally often)"
        )
    if count and options.batch_size % count:
        raise InputError(
            f"--sampler {options.sampler} takes {count} images of each class, and --batch-size {options.batch_size} is "
            f"no multiple of {count}; give one that is"
        )


def check_peers(options: Options, peers: int) -> None:
    """Check peers, models, topology and method against each other.

    Raises:
        InputError: two options contradict each other.
    """
    method, topology = options.method, options.topology
    if topology not in method.topologies:
        reason = "needs a trunk, so it " if topology == "networks" and "branches" in method.topologies else ""
        only = " and ".join(method.topologies)
        raise InputError(f"{method.name} {reason}works on {only} only; drop --topology {topology}")
    if peers < method.min_peers:
        raise InputError(f"--peers is {peers}; {method.name} needs at least {method.min_peers}{method.min_peers_note}")
    if peers > MAX_PEERS:
        raise InputError(f"--peers is {peers:,}; give {MAX_PEERS:,} or fewer")
    if method.max_peers is not None and peers > method.max_peers:
        raise InputError(f"--peers is {peers}; {method.name} is defined for at most {method.max_peers}")
    _check_deploy(options, peers)
    if len(options.model) > 1 and len(options.model) != peers:
        raise InputError(f"--model is given {len(options.model)} times for --peers {peers}; give one, or one per peer")
    if topology == "branches" and len(options.model) > 1:
        raise InputError("--topology branches takes one --model: branches share a trunk; use --topology networks")
    if topology == "twins":
        _check_twins(options)
    method.check(options)
    _check_branching(options, peers)
    if method.num_exits() or method.num_maps():
        _check_exits(options)
    if options.checkpoint_activations and (topology == "branches" or options.execution == "stacked"):
        why = "branches share a trunk" if topology == "branches" else "--execution stacked runs them as one"
        raise InputError(f"--checkpoint-activations runs each network again by itself, but {why}; drop one of the two")


def _check_twins(options: Options) -> None:
    if len(options.model) > 1:
        raise InputError("--topology twins takes one --model: twins are one network, run twice")
    if options.deploy == "ensemble":
        raise InputError("--deploy ensemble: twins are one network, which is deployed as it is; drop it")


def _check_exits(options: Options) -> None:
    name = options.method.name
    if options.topology == "branches":
        raise InputError(f"{name} gives each network exits, and branches have none; drop --topology branches")
    if options.checkpoint_activations:
        what = f"the exits of {name} share" if options.method.num_exits() else f"{name} keeps"
        raise InputError(
            f"--checkpoint-activations runs each network again by itself, but {what} its maps; drop one of the two"
        )


def _check_deploy(options: Options, peers: int) -> None:
    deploy = options.deploy
    if deploy not in ("member", "ensemble", "ema", "swa", *map(str, range(peers))):
        raise InputError(f"--deploy {deploy}: give member, ensemble, ema, swa, or a number from 0 to {peers - 1}")
    if options.ema_decay is not None and deploy == "ema" and options.method.keeps_ema:
        raise InputError(
            f"--ema-decay: --deploy ema deploys the mean teacher of {options.method.name}, whose decay is "
            "--method.ema-decay; give that"
        )
    for name, needed in (("ema_decay", "ema"), ("swa_start", "swa"), ("swa_lr", "swa")):
        if getattr(options, name) is not None and deploy != needed:
            raise InputError(f"--{name.replace('_', '-')} shapes --deploy {needed}; add it, or drop the option")


def _check_branching(options: Options, peers: int) -> None:
    fan_out = options.fan_out
    if options.topology != "branches" and (options.branch_at or fan_out):
        raise InputError("--branch-at and --fan-out shape branches; add --topology branches")
    if fan_out and math.prod(fan_out) != peers:
        numbers = " ".join(map(str, fan_out))
        raise InputError(f"--fan-out {numbers} makes {math.prod(fan_out)} branches, not --peers {peers}")
    if len(options.branch_at) > 1 and len(fan_out) != len(options.branch_at):
        raise InputError("--fan-out needs one number for each --branch-at")


def check_mesh(options: Options, peers: int) -> None:
    """Check the mesh against the peers and the batch.

    Raises:
        InputError: peers or samples cannot be split over that many processes.
    """
    data, peer = mesh_shape(options.mesh)
    if peer > 1 and options.topology == "branches":
        raise InputError(
            f"--mesh {options.mesh}: branches share a trunk, so they cannot be spread over the axis peer; "
            f"give --mesh data={data * peer}, or --topology networks"
        )
    if peer > 1 and options.topology == "twins":
        raise InputError(
            f"--mesh {options.mesh}: twins are one network, so they cannot be spread over the axis peer; "
            f"give --mesh data={data * peer}"
        )
    name = options.method.name
    if options.method.num_maps() and data * peer > 1:
        raise InputError(
            f"--mesh {options.mesh}: {name} fuses the maps of all networks, normalized over the whole batch, in one "
            "process; drop --mesh"
        )
    if peers % peer:
        raise InputError(
            f"--mesh {options.mesh}: {peers} peers cannot be shared out evenly among {peer} processes; "
            f"give a peer=P that divides {peers}, or other --peers"
        )
    if data * peer > 1 and options.execution == "stacked":
        raise InputError("--execution stacked runs the peers as one network in one process; drop it, or --mesh")
    if data * options.accumulate > options.batch_size:
        flag, what = f"--mesh {options.mesh}", "processes"
        if options.accumulate > 1:
            flag, what = f"--accumulate {options.accumulate}", "parts"
        raise InputError(f"{flag}: --batch-size {options.batch_size} leaves {what} without samples; raise it")
    if options.accumulate > 1 and options.sync_bn and data > 1:
        raise InputError("--sync-bn normalizes by the whole batch, --accumulate never holds it; drop one of the two")


def parse_normalize(rule: str | None) -> str | tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return imagenet or dataset as they are, `M,M,M,S,S,S` as (means, standard deviations), None as None.

    Raises:
        InputError: the text is none of these.

    >>> parse_normalize("0.5,0.25")
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
            f"--normalize {rule}: give imagenet, dataset, or means and standard deviations of pixels / 255, separated "
            "by commas, as in 0.5,0.5,0.5,0.25,0.25,0.25"
        )
    return numbers[:half], numbers[half:]


def images_per_class(sampler: str) -> int:
    """Return M of `pairs:M`, 0 of `uniform`.

    Raises:
        InputError: the text is neither.

    >>> images_per_class("pairs:2")
    2
    """
    if sampler == "uniform":
        return 0
    name, _, count = sampler.partition(":")
    if name != "pairs" or not count.isdecimal() or not 2 <= int(count) < LIMIT:
        raise InputError(f"--sampler {sampler}: give uniform, or pairs:M with M of 2 or more images, as in pairs:2")
    return int(count)


def mesh_shape(mesh: str | None) -> tuple[int, int]:
    """Return (D, P) of `data=D,peer=P`; an axis that is not named has one process.

    Raises:
        InputError: the text has another form.

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
