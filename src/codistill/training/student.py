"""What a run deploys: one member, an average of its weights, or the ensemble, as one network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import Config
from codistill.data import Loader
from codistill.distributed import MeshPeers
from codistill.methods import Method, build_method
from codistill.peers import MeanTeacher, Peers, build_peers
from codistill.runs import errors_of_checkpoint
from codistill.training.run import Run
from codistill.utils import count_parameters


def load_student(config: Config, state: Mapping[str, Any], classes: int, channels: int, image_size: int) -> nn.Module:
    """Return the network that `config.deploy` names, with a checkpoint's weights, in evaluation mode.

    Args:
        config: The run's, resolved and without pretrained weights.
        state: A checkpoint.
        classes: Number of classes.
        channels: Channels of the images.
        image_size: Their side.

    Raises:
        InputError: the checkpoint does not fit the config.
    """
    peers = build_peers(config, classes, channels, image_size)
    method = build_method(config.method, peers, config.seed)
    average = MeanTeacher(peers, 0.0) if config.deploy in ("ema", "swa") else None
    with errors_of_checkpoint(state):
        if average is not None:
            average.load_state_dict(state["average" if config.keeps_average else "ema"])
        peers.load_state_dict(state["peers"])
        method.load_state_dict(state["method"])
        return build_student(config.deploy, peers, method, average)


def deployed_network(run: Run) -> nn.Module:
    """Return what `Config.deploy` names, as one network in evaluation mode.

    Raises:
        InputError: the deployed member is on another rank.
    """
    return build_student(run.config.deploy, run.peers, run.method, run.evaluated_average)


def build_student(deploy: str, peers: Peers, method: Method, average: MeanTeacher | None) -> nn.Module:
    """Return what `deploy` names (see `Config.deploy`), as one network in evaluation mode."""
    if deploy == "ensemble":
        return method.deploy_ensemble(peers).eval()
    if deploy in ("ema", "swa"):
        assert average is not None
        return average.export_member(method.deployed).eval()
    return (peers.export_member(int(deploy)) if deploy.isdigit() else method.deploy(peers)).eval()


def deployed_index(run: Run) -> int:
    """Return the number of the member (or of the mean teacher) that is deployed."""
    return int(run.config.deploy) if run.config.deploy.isdigit() else run.method.deployed


def deployed_name(run: Run) -> str:
    """Return it in words: `member 3`, `ensemble`, `mean teacher 0`, `EMA of member 3`, `SWA of member 3`."""
    if run.config.deploy == "ensemble":
        return "ensemble"
    kind = "member"
    if run.average is not None:
        kind = f"{run.config.deploy.upper()} of member"
    elif run.config.deploy == "ema":
        kind = "mean teacher"
    return f"{kind} {deployed_index(run)}"


def deploys_average(run: Run) -> bool:
    """Return whether an average of a member's weights is deployed, and not the member or the ensemble."""
    return run.config.deploy in ("ema", "swa")


def deployed_figures(run: Run, figures: dict[str, Any], average: dict[str, Any] | None) -> dict[str, float]:
    """Pick the deployed network's figures from those of all members."""
    names = [name for name in ("top1", "top5", "nll", "ece") if name in figures]
    if run.config.deploy == "ensemble":
        return {name: figures[f"ensemble_{name}"] for name in names}
    index = deployed_index(run)
    source = average if deploys_average(run) and average is not None else figures
    return {name: source[name][index] for name in names}


def count_trained_and_deployed(run: Run) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of those that are deployed."""
    of_method = count_parameters(run.method, trained_only=True)
    if isinstance(run.peers, MeshPeers) and run.mesh.num_peer > 1:
        counts = run.peers.parameter_counts
        ensemble = sum(counts) + count_parameters(run.method)
        deployed = ensemble if run.config.deploy == "ensemble" else counts[deployed_index(run)]
        return sum(run.peers.trained_counts) + of_method, deployed
    return count_parameters(run.peers, trained_only=True) + of_method, count_parameters(deployed_network(run))


@torch.inference_mode()
def deployed_scores(run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return the deployed student's logits on a data set, `N x C` in float64 on the CPU, and the labels `N`."""
    student = deployed_network(run).to(loader.device)
    pairs = [(student(views[0]).cpu().double(), labels.cpu()) for views, labels in loader.epoch()]
    scores, labels = zip(*pairs)
    return torch.cat(scores), torch.cat(labels)
