"""A trial of networks that codistill does not know, before the first epoch: whatever a run will do with them.

Forward and backward in training, forward in evaluation, the copy that is deployed and its state dict, in the run's own
memory format. A network that only works with contiguous tensors (`x.view(-1, 400)`) gets contiguous ones. Nothing that
the run computes later depends on the trial: buffers and all random states are put back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from codistill.config import Config
from codistill.models import MODELS
from codistill.peers import Peers, TwinPeers, eval_mode, frozen_batchnorm_stats, train_mode
from codistill.runs import restore_rng, rng_state
from codistill.utils import InputError, first_line, out_of_memory

CONTIGUOUS_NOTE = "--model takes contiguous images only (as x.view does), so the run uses --no-channels-last"


def try_networks(
    config: Config, peers: Peers, teacher: nn.Module | None, image_shape: tuple[int, int, int]
) -> tuple[Config, list[str]]:
    """Try the networks, and return the config that they can run, with notes on what was changed.

    Args:
        config: A resolved config.
        peers: This process's peers, on their device; where they cannot take channels_last they become contiguous.
        teacher: A trained teacher, if there is one.
        image_shape: C, H, W.

    Raises:
        InputError: a network fails in some part of a run, or cannot be trained on batches of one image.
    """
    config, notes = _try_unknown(config, peers, teacher, image_shape)
    if config.batch_size == 1 and (error := _try(config, peers, None, image_shape, rows=1)) is not None:
        _, reason = error
        raise InputError(
            f"--batch-size 1: {', '.join(dict.fromkeys(config.model))} cannot be trained on one image at a time "
            f"({first_line(reason)}); give 2 or more"
        ) from reason
    return config, notes


def _try_unknown(
    config: Config, peers: Peers, teacher: nn.Module | None, image_shape: tuple[int, int, int]
) -> tuple[Config, list[str]]:
    """Try networks that codistill does not hold itself; see `try_networks`."""
    if all(name in MODELS for name in config.model):
        return config, []
    error = _try(config, peers, teacher, image_shape)
    if error is None:
        return config, []
    if config.channels_last:
        for module in (peers, teacher):
            if module is not None:
                module.to(memory_format=torch.contiguous_format)  # pyrefly: ignore
        config = dataclasses.replace(config, channels_last=False)
        if _try(config, peers, teacher, image_shape) is None:
            return config, [CONTIGUOUS_NOTE]
    part, reason = error
    shape = " x ".join(map(str, image_shape))
    raise InputError(
        f"--model {', '.join(dict.fromkeys(config.model))}: {part} fails on images of {shape} "
        f"({first_line(reason)}); fix the network, or give another one"
    ) from reason


def _try(
    config: Config, peers: Peers, teacher: nn.Module | None, image_shape: tuple[int, int, int], rows: int = 2
) -> tuple[str, Exception] | None:
    """Run every part once on so many images; return the part that failed and its error, None if none did."""
    parameter = next(peers.parameters())
    channels, height, width = image_shape
    pixels = torch.linspace(-40.0, 40.0, rows * channels * height * width).sin().to(parameter)
    if config.channels_last:  # as the loaders make them
        images_BCHW = pixels.view(rows, height, width, channels).movedim(-1, 1)
    else:
        images_BCHW = pixels.view(rows, channels, height, width)
    buffers = [(buffer, buffer.clone()) for buffer in peers.buffers()]
    random_states = rng_state()
    part = "training"
    try:
        with train_mode(peers):
            _run_backward(peers, images_BCHW)
        with eval_mode(peers), torch.inference_mode():
            part = "evaluation"
            peers(images_BCHW)
            if teacher is not None:
                part = "the teacher"
                teacher(images_BCHW)
        part = "the copy that is deployed"
        for p in range(peers.num_peers):
            student = peers.export_member(p).eval()
            with torch.inference_mode(), torch.autocast(images_BCHW.device.type, enabled=False):
                student(images_BCHW)
            student.load_state_dict(student.state_dict())
    except Exception as error:  # whatever the network's own code raises
        if out_of_memory(error) is not None:
            raise
        return part, error
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        restore_rng(random_states)
    return None


def _run_backward(peers: Peers, images_BCHW: Tensor) -> None:
    parameters = [p for p in peers.parameters() if p.requires_grad]
    loss = peers(images_BCHW).logits_PBC.float().square().sum()
    torch.autograd.grad(loss, parameters, allow_unused=True)


def check_twins_differ(twins: TwinPeers, images_BCHW: Tensor) -> None:
    """Run the network in training mode, and look whether it draws random numbers; nothing is left of it.

    Outputs are no evidence: where the last BatchNorm of a block or its layer scale begins at 0, drop path changes
    nothing yet.

    Args:
        twins: On their device.
        images_BCHW: Some training images.

    Raises:
        InputError: nothing is random in the network, so that twins that see the same images are the same.
    """
    before = rng_state()
    try:
        with torch.no_grad(), train_mode(twins), frozen_batchnorm_stats(twins):
            twins(images_BCHW)  # so that a single image has its twin's row beside it
        after = rng_state()
    finally:
        restore_rng(before)
    if _torch_states(before) != _torch_states(after):
        return
    raise InputError(
        "--model: nothing is random in this network, so twins that see the same images are the same; give one with "
        "drop path or dropout (as in --model timm:resnet18,drop_path_rate=0.1), or --method.own-views"
    )


def _torch_states(state: dict[str, Any]) -> list[list[int]]:
    """Return the random states of torch on every device."""
    devices = [state["torch"], *state.get("cuda", ()), *([state["mps"]] if "mps" in state else [])]
    return [device_state.tolist() for device_state in devices]
