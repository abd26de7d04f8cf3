"""What training and inference cost: floating-point operations, time, memory.

FLOPs count matrix products and convolutions, a multiplication and an addition as two, as
`torch.utils.flop_counter` does. What cannot be measured is None.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from codistill.methods import Method
from codistill.peers import (
    Inputs,
    NetworkPeers,
    PeerOutputs,
    Peers,
    Views,
    call_network,
    device_of,
    eval_mode,
    map_tensors,
)
from codistill.utils import allocated_bytes, peak_megabytes, reset_peak_memory, synchronize

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

MAX_SECONDS = 1.0
"""Time after which no further forward is measured: a large network on a CPU takes seconds for one of 64 images."""


def training_flops(
    peers: Peers,
    method: Method,
    forward: Callable[[Any], PeerOutputs],
    inputs: Inputs | list[Inputs],
    targets_B: Tensor,
) -> float:
    """Return the FLOPs of one step per sample: forward of all (mean and trained teachers too) and backward.

    Weights and running statistics stay as they are.

    Args:
        peers: All members.
        method: What trains them.
        forward: Forwards the peers and teachers, as the training step does.
        inputs: What the peers take, one view or one per peer.
        targets_B: Their labels.
    """
    counter = _count_flops()
    with eval_mode(peers), eval_mode(method), counter:
        outputs = forward(inputs)
        method(outputs, targets_B, 1.0)["loss"].backward()
        if method.update_mode == "alternating" and isinstance(peers, NetworkPeers):  # all but the last run again
            current = PeerOutputs(outputs.logits_PBC.detach().clone(), [])
            for p in range(peers.num_peers - 1):
                peers.refresh(current, inputs, p)
    for module in (peers, method):
        module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(targets_B)


def plain_training_flops(network: nn.Module, sample: Inputs) -> float:
    """Return the FLOPs of one pass, forward and backward, of a plain network per sample: the unit of training costs.

    Args:
        network: In evaluation mode, and not needed for anything else.
        sample: One sample of what it takes, without the batch (`C x H x W` for images).
    """
    counter = _count_flops()
    network.requires_grad_(True)
    with counter:
        call_network(network, repeat_sample(sample, 2)).sum().backward()
    return counter.get_total_flops() / 2


def forward_flops(peers: Peers, inputs: Inputs | list[Inputs]) -> float:
    """Return the FLOPs of a forward of all members per sample."""
    counter = _count_flops()
    with torch.no_grad(), eval_mode(peers), counter:
        outputs = peers(inputs)
    return counter.get_total_flops() / outputs.logits_PBC.shape[1]


def inference_cost(student: nn.Module, sample: Inputs, autocast: torch.dtype | None = None) -> dict[str, float | None]:
    """Return FLOPs per sample, latency per sample at batch 1 and 64 in milliseconds, and a GPU's peak memory in MiB.

    Args:
        student: In evaluation mode.
        sample: One sample of what it takes, without the batch (`C x H x W` for images), on the device to measure.
        autocast: Dtype of autocast, if any.

    >>> inference_cost(nn.Linear(4, 2), torch.zeros(4))["flops_an_image"]
    16
    """
    device = device_of(sample)
    one, batch = repeat_sample(sample, 1), repeat_sample(sample, 64)
    counter = _count_flops()
    in_autocast = torch.autocast(device.type, autocast, enabled=autocast is not None)
    with torch.no_grad(), in_autocast, counter:  # in inference mode the counter breaks parametrized modules
        call_network(student, one)
    with torch.inference_mode(), in_autocast:
        other_bytes = allocated_bytes(device) - sum(x.nbytes for x in (*student.parameters(), *student.buffers()))
        reset_peak_memory(device)
        latency_batch1 = _measure_milliseconds(student, one)
        latency_batch64 = _measure_milliseconds(student, batch) / 64
    return {
        "flops_an_image": counter.get_total_flops(),
        "ms_an_image": round(latency_batch1, 4),
        "ms_an_image_of_64": round(latency_batch64, 4),
        "peak_mb": (peak_megabytes(device) or 0.0) - other_bytes / 2**20 if device.type == "cuda" else None,
    }


def repeat_sample(sample: Inputs, count: int) -> Inputs:
    """Return a batch of `count` equal samples.

    >>> repeat_sample((torch.zeros(3), torch.zeros(2, 5)), 4)[1].shape
    torch.Size([4, 2, 5])
    """
    return map_tensors(lambda x: x.expand(count, *x.shape).contiguous(), sample)


def inner_step_flops(
    method: Method, peers: Peers, views: Views, targets_B: Tensor, optimizer: torch.optim.Optimizer
) -> float:
    """Return the FLOPs per sample of the steps that a method tries on a batch; its state stays as it is.

    Args:
        method: Has `run_inner_steps`.
        peers: All members.
        views: What the peers take, one view or one per peer.
        targets_B: Their labels.
        optimizer: Over peers and method.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):  # torch's own refuses gradients of gradients
        flops = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if count := flop_registry.get(func._overloadpacket):
                self.flops += count(*args, **(kwargs or {}), out_val=result)
            return result

    state = {name: value.clone() for name, value in method.state_dict().items()}
    with eval_mode(peers), eval_mode(method), Counter() as counter:
        method.run_inner_steps(peers, views, targets_B, optimizer)
    method.load_state_dict(state)
    return counter.flops / len(targets_B)


def _count_flops() -> FlopCounterMode:
    """Return a counter; its module is imported here because it imports triton, which evaluation alone does not need."""
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _measure_milliseconds(student: nn.Module, inputs: Inputs) -> float:
    """Return the median time of 5 forwards after one to warm up; of fewer where they take more than `MAX_SECONDS`."""
    times: list[float] = []
    while len(times) < 6 and sum(times) < MAX_SECONDS:
        started = time.perf_counter()
        call_network(student, inputs)
        synchronize(device_of(inputs))
        times.append(time.perf_counter() - started)
    return 1000 * median(times[1:] or times)
