"""What a run deploys, built from its config and a checkpoint alone: its images need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.data import Loader
from codistill.distributed.peers import MeshPeers, require_local
from codistill.methods import build_method
from codistill.peers.ema import MeanTeacher
from codistill.peers.from_config import build_peers
from codistill.training.run import Run


def saved_student(config: Config, state: Mapping[str, Any], classes: int, channels: int, image_size: int) -> nn.Module:
    """Return the network that `config.deploy` names, with a checkpoint's weights, in evaluation mode.

    Args:
        config: The run's, resolved and without pretrained weights.
        state: What `load_run_checkpoint` returns.
        classes: Number of classes.
        channels: Channels of the images.
        image_size: Their side.
    """
    peers = build_peers(config, classes, channels, image_size)
    method = build_method(config.method, peers, config.seed)
    if config.deploy == "ema":
        teacher = MeanTeacher(peers, method.ema_decay)
        teacher.load_state_dict(state["ema"])
        return teacher.export_member(method.deployed).eval()
    peers.load_state_dict(state["peers"])
    method.load_state_dict(state["method"])
    if config.deploy == "ensemble":
        return method.deploy_ensemble(peers).eval()
    return (peers.export_member(int(config.deploy)) if config.deploy.isdigit() else method.deploy(peers)).eval()


def deployed_network(run: Run) -> nn.Module:
    """Return what `Config.deploy` names, as one network in evaluation mode."""
    if run.config.deploy == "ensemble":
        return run.method.deploy_ensemble(run.peers).eval()
    require_local(run.peers, deployed_index(run))
    if run.config.deploy == "ema":
        assert run.ema is not None
        return run.ema.export_member(run.method.deployed).eval()
    index = deployed_index(run)
    return (run.method.deploy(run.peers) if index == run.method.deployed else run.peers.export_member(index)).eval()


def deployed_index(run: Run) -> int:
    """Return the number of the member (or of the mean teacher) that is deployed."""
    return int(run.config.deploy) if run.config.deploy.isdigit() else run.method.deployed


def deployed_name(run: Run) -> str:
    """Return it in words: `member 3`, `ensemble`, `mean teacher 0`."""
    if run.config.deploy == "ensemble":
        return "ensemble"
    return f"{'mean teacher' if run.config.deploy == 'ema' else 'member'} {deployed_index(run)}"


def deployed_figures(run: Run, figures: dict[str, Any], ema_figures: dict[str, Any] | None) -> dict[str, float]:
    """Pick the deployed network's figures out of those of all members."""
    names = [name for name in ("top1", "top5", "nll", "ece") if name in figures]
    if run.config.deploy == "ensemble":
        return {name: figures[f"ensemble_{name}"] for name in names}
    index = deployed_index(run)
    source = ema_figures if run.config.deploy == "ema" and ema_figures is not None else figures
    return {name: source[name][index] for name in names}


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    """Return how many numbers a module's parameters hold, or those that are trained; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def numbers_trained_and_deployed(run: Run) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of those that are deployed."""
    if isinstance(run.peers, MeshPeers) and run.mesh is not None and run.mesh.num_peer > 1:
        counts = run.peers.parameter_counts
        trained = sum(run.peers.trained_counts) + count_parameters(run.method, trained=True)
        whole = sum(counts) + count_parameters(run.method)
        return trained, whole if run.config.deploy == "ensemble" else counts[deployed_index(run)]
    trained = count_parameters(run.peers, trained=True) + count_parameters(run.method, trained=True)
    return trained, count_parameters(deployed_network(run))


@torch.inference_mode()
def deployed_scores(run: Run, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return the deployed student's logits on a set, `N x C` in double precision on the CPU, and the labels."""
    student = deployed_network(run).to(loader.device)
    pairs = [(student(views[0]).cpu().double(), labels.cpu()) for views, labels in loader.epoch()]
    scores, labels = zip(*pairs)
    return torch.cat(scores), torch.cat(labels)
