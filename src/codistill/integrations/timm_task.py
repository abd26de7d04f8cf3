"""Peers as a training task of timm, for its training script or a loop like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codistill.methods import Method
from codistill.peers import Peers
from codistill.training import PeerTraining
from codistill.utils import InputError

try:
    from timm.task import TrainingTask
    from timm.utils import unwrap_model
except ImportError:
    raise InputError("codistill.integrations.PeerTask needs: pip install 'timm>=1.0.23' (with timm.task)") from None


class PeerTask(TrainingTask):
    """Trains peers: `task(inputs, targets)["loss"].backward()`, then a step of the attached optimizer.

    Evaluation (`get_eval_model`) runs the deployed member. A checkpoint of the task's model state holds the peers, the
    method and the mean teachers. timm's own averaged weights (`setup_ema`) average all of it.

    Args:
        peers: `NetworkPeers` or `BranchPeers`.
        method: Built for them; it updates all members at once.
        steps_per_epoch: Optimizer steps of an epoch.
        teacher: A trained network, for kd.
        device: Of the task; the peers are moved there.
        options: Further arguments of timm's `TrainingTask` (dtype, verbose).

    Raises:
        InputError: the method steps one member after the other, or cannot train these peers (see `PeerTraining`).

    >>> import codistill as cd
    >>> peers = cd.NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8)
    >>> task = PeerTask(peers, cd.methods.KDCL(num_peers=2, own_views=False), steps_per_epoch=10)
    >>> task(torch.zeros(4, 3, 8, 8), torch.arange(4))["output"].shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        peers: Peers,
        method: Method,
        steps_per_epoch: int,
        teacher: nn.Module | None = None,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        super().__init__(device=device, **options)
        if method.update_mode == "alternating":
            raise InputError(
                f'{method.name} updates one member after the other, which a task cannot; build it with update="joint"'
            )
        self.trainable_module: nn.Module = PeerTraining(peers, method, teacher, steps_per_epoch).to(self.device)

    @property
    def peer_training(self) -> PeerTraining:
        """Peers, method and teachers, also after `prepare_distributed`."""
        training = unwrap_model(self.trainable_module)
        assert isinstance(training, PeerTraining)
        return training

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> PeerTask:
        """Let several processes, each with its own part of the batch, average their gradients; return the task.

        Args:
            device_ids: Of `DistributedDataParallel`.
            ddp_kwargs: Further arguments of it.

        Raises:
            InputError: the method needs the whole batch at once.
        """
        self.peer_training.check_loop(torch.distributed.get_world_size(), 1)
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids, **ddp_kwargs)
        return self

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer's steps end the training steps; call it once, before training.

        Args:
            optimizer: Over `task.peer_training.trained_parameters()`.
        """
        self.peer_training.attach(optimizer)

    def forward(self, input: Any, target: Tensor) -> dict[str, Any]:
        """Return the loss, the deployed member's logits as `output`, and the means of the method's terms by member.

        Args:
            input: What the networks take, for all peers or as a list of one for each.
            target: Class numbers `B`, or soft labels `B x C`.
        """
        training = self.peer_training
        weight = training.method.weight_at(training.steps_done // (training.steps_per_epoch or 1))
        terms = self.trainable_module(input, target, weight)
        logged = {name: terms[name].detach().mean() for name in ("ce_P", "distill_P")}
        return {"loss": terms["loss"], "output": training.last_logits_BC, **logged}

    def student(self) -> nn.Module:
        """Return the one plain network that is deployed: a copy in evaluation mode."""
        return self.peer_training.student()
