"""What a run deploys, built from its config and a checkpoint alone: its images need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codistill.config.config import Config
from codistill.config.methods import MethodConfig
from codistill.data import Loader
from codistill.distributed.peers import MeshPeers, refuse_foreign
from codistill.methods import build_method
from codistill.peers.ema import MeanTeacher
from codistill.peers.from_config import build_peers
from codistill.training.run import Training


def saved_student(config: Config, state: dict[str, Any], classes: int, channels: int, image_size: int) -> nn.Module:
    """Return the network that `config.deploy` names, with a checkpoint's weights, in evaluation mode.

    Args:
        config: The run's, resolved and without pretrained weights.
        state: What `checkpoint.load_state` returns.
        classes: Number of classes.
        channels: Channels of the images.
        image_size: Their side.
    """
    assert isinstance(config.method, MethodConfig)
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


def deployed_network(t: Training) -> nn.Module:
    """Return what `Config.deploy` names, as one network in evaluation mode."""
    if t.config.deploy == "ensemble":
        return t.method.deploy_ensemble(t.peers).eval()
    refuse_foreign(t.peers, deployed_index(t))
    if t.config.deploy == "ema":
        assert t.ema is not None
        return t.ema.export_member(t.method.deployed).eval()
    index = deployed_index(t)
    return (t.method.deploy(t.peers) if index == t.method.deployed else t.peers.export_member(index)).eval()


def deployed_index(t: Training) -> int:
    """Return the number of the member (or of the mean teacher) that is deployed."""
    return int(t.config.deploy) if t.config.deploy.isdigit() else t.method.deployed


def deployed_name(t: Training) -> str:
    """Return it in words: `member 3`, `ensemble`, `mean teacher 0`."""
    if t.config.deploy == "ensemble":
        return "ensemble"
    return f"{'mean teacher' if t.config.deploy == 'ema' else 'member'} {deployed_index(t)}"


def deployed_figures(t: Training, figures: dict[str, Any], ema_figures: dict[str, Any] | None) -> dict[str, float]:
    """Pick the deployed network's figures out of those of all members."""
    names = [name for name in ("top1", "top5", "nll", "ece") if name in figures]
    if t.config.deploy == "ensemble":
        return {name: figures[f"ensemble_{name}"] for name in names}
    index = deployed_index(t)
    source = ema_figures if t.config.deploy == "ema" and ema_figures is not None else figures
    return {name: source[name][index] for name in names}


def count_parameters(module: nn.Module, trained: bool = False) -> int:
    """Return how many numbers a module's parameters hold, or those that are trained; shared ones count once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def numbers_trained_and_deployed(t: Training) -> tuple[int, int]:
    """Return the number of parameters that are trained, and of those that are deployed."""
    if isinstance(t.peers, MeshPeers) and t.mesh is not None and t.mesh.num_peer > 1:
        counts = t.peers.parameter_counts
        trained = sum(t.peers.trained_counts) + count_parameters(t.method, trained=True)
        whole = sum(counts) + count_parameters(t.method)
        return trained, whole if t.config.deploy == "ensemble" else counts[deployed_index(t)]
    trained = count_parameters(t.peers, trained=True) + count_parameters(t.method, trained=True)
    return trained, count_parameters(deployed_network(t))


@torch.inference_mode()
def deployed_scores(t: Training, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return the deployed student's logits on a set, `N x C` in double precision on the CPU, and the labels."""
    student = deployed_network(t).to(loader.device)
    pairs = [(student(views[0]).cpu().double(), labels.cpu()) for views, labels in loader.epoch()]
    scores, labels = zip(*pairs)
    return torch.cat(scores), torch.cat(labels)
