"""What a run costs: floating-point operations, time, memory; of training against deploying.

FLOPs count matrix products and convolutions, a multiplication and an addition as two, as
`torch.utils.flop_counter` does. What cannot be measured is None.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from codistill.methods import Method
from codistill.peers.base import PeerOutputs, Peers
from codistill.peers.modes import eval_mode
from codistill.peers.networks import NetworkPeers
from codistill.utils.device import _allocated, peak_megabytes, reset_peak_memory, synchronize


def training_flops(peers: Peers, method: Method, outputs_of: Any, views_VBCHW: Tensor, targets_B: Tensor) -> float:
    """Return the FLOPs of one step, a sample: forward of all (mean and trained teachers too) and backward.

    Weights and running statistics stay as they are.

    Args:
        peers: All members.
        method: What is trained with.
        outputs_of: Runs the peers and whatever else the method hears, as the loop does; takes views.
        views_VBCHW: Images.
        targets_B: Their labels.
    """
    counter = FlopCounterMode(display=False)
    with eval_mode(peers), eval_mode(method), counter:
        outputs: PeerOutputs = outputs_of(views_VBCHW)
        method(outputs, targets_B, 1.0)["loss"].backward()
        if method.update_mode == "alternating" and isinstance(peers, NetworkPeers):  # all but the last speak once more
            said = PeerOutputs(outputs.logits_PBC.detach().clone(), [])
            for p in range(peers.num_peers - 1):
                peers.refresh(said, views_VBCHW, p)
    for module in (peers, method):
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(targets_B)


def inference_cost(
    student: nn.Module, image_CHW: Tensor, autocast: torch.dtype | None = None
) -> dict[str, float | None]:
    """Return an image's FLOPs, its milliseconds alone and among 64, and a GPU's peak of memory among 64."""
    device = image_CHW.device
    one_BCHW, many_BCHW = image_CHW.unsqueeze(0), image_CHW.expand(64, *image_CHW.shape).contiguous()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        with counter:
            student(one_BCHW)
        others = _allocated(device) - sum(x.nbytes for x in (*student.parameters(), *student.buffers()))
        reset_peak_memory(device)
        alone, among = _milliseconds(student, one_BCHW), _milliseconds(student, many_BCHW) / len(many_BCHW)
    return {
        "flops_an_image": counter.get_total_flops(),
        "ms_an_image": round(alone, 4),
        "ms_an_image_of_64": round(among, 4),
        "peak_mb": (peak_megabytes(device) or 0.0) - others / 2**20 if device.type == "cuda" else None,
    }


def _milliseconds(student: nn.Module, x_BCHW: Tensor) -> float:
    """Return the median time of 5 passes, after one to warm up."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        student(x_BCHW)
        synchronize(x_BCHW.device)
        times.append(time.perf_counter() - began)
    return 1000 * median(times[1:])
