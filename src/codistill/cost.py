"""What a run costs: floating-point operations, time, memory; of training against deploying.

FLOPs count matrix products and convolutions, a multiplication and an addition as two, as
`torch.utils.flop_counter` does. What cannot be measured is None.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from codistill.methods import Method
from codistill.peers import NetworkPeers, PeerOutputs, Peers, eval_mode

_PROCESS = Path("/proc/self")


def forget_peak(device: torch.device) -> None:
    """Start measuring the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")  # Linux: the process's peak falls to what it uses now


def peak_megabytes(device: torch.device) -> float | None:
    """Return the peak since `forget_peak`: of a GPU's allocated memory, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = (_PROCESS / "status").read_text()
    except OSError:
        return None
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak.split()[1]) / 2**10 if peak else None


def _allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on a GPU, 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
        if method.update == "alternating" and isinstance(peers, NetworkPeers):  # all but the last speak once more
            said = PeerOutputs(outputs.logits_PBC.detach().clone(), [])
            for p in range(peers.num_peers - 1):
                peers.refresh(said, views_VBCHW, p)
    for module in (peers, method):
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(targets_B)


def deploying(student: nn.Module, image_CHW: Tensor, autocast: torch.dtype | None = None) -> dict[str, float | None]:
    """Return an image's FLOPs, its milliseconds alone and among 64, and a GPU's peak of memory among 64."""
    device = image_CHW.device
    one_BCHW, many_BCHW = image_CHW.unsqueeze(0), image_CHW.expand(64, *image_CHW.shape).contiguous()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        with counter:
            student(one_BCHW)
        others = _allocated(device) - sum(x.nbytes for x in (*student.parameters(), *student.buffers()))
        forget_peak(device)
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
        wait_for(x_BCHW.device)
        times.append(time.perf_counter() - began)
    return 1000 * median(times[1:])
