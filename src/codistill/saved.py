"""What a run deploys, built from its config and a checkpoint alone: its images need not be there."""

from __future__ import annotations

from typing import Any

from torch import nn

from codistill.config import Config, MethodConfig
from codistill.mean_teacher import MeanTeacher
from codistill.methods import build_method
from codistill.peers import build_peers


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
