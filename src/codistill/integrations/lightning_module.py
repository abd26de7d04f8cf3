"""Peers as a module of Lightning.

Optimization is manual, because a method may step one member after the other, let members pause in a step, and move mean
teachers after it. What follows from that: the optimizer and its schedule are given here, Lightning's own gradient
clipping and accumulation are off (it says so), and precision, devices, loggers, callbacks and checkpoints are
Lightning's. A checkpoint holds peers, method and mean teachers, so that `trainer.fit(..., ckpt_path=...)` continues
exactly. Several processes average their gradients as usual; each has its own part of a batch, and a method that needs
the whole one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from codistill.evaluation import PeerMetrics
from codistill.methods import Method
from codistill.peers import Peers
from codistill.training import PeerTraining
from codistill.utils import InputError

try:
    from lightning import LightningModule
except ImportError:
    raise InputError("codistill.integrations.PeerModule needs: pip install lightning") from None


class PeerModule(LightningModule):
    """Trains peers in a Lightning `Trainer`; batches are pairs of inputs and class numbers.

    Logged by epoch: `train_loss`, and on validation data `val_top1`, `val_nll` (of the deployed member) and
    `val_ensemble_top1`; `Trainer.test` logs the same as `test_...`. `Trainer.predict` gives the deployed member's
    logits, for batches with labels and without.

    Args:
        peers: `NetworkPeers` or `BranchPeers`.
        method: Built for them.
        optimizer: Builds the optimizer from the parameters.
        scheduler: Builds a learning rate schedule from the optimizer; it steps once an epoch.
        teacher: A trained network, for kd.

    Raises:
        InputError: the method lacks a teacher or cannot train these peers (see `PeerTraining`).

    >>> import codistill as cd
    >>> peers = cd.NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8)
    >>> module = PeerModule(peers, cd.methods.KDCL(num_peers=2), lambda p: torch.optim.SGD(p, lr=0.05))
    >>> module.student()(torch.zeros(4, 3, 8, 8)).shape  # after Trainer(...).fit(module, loader)
    torch.Size([4, 10])
    """

    def __init__(
        self,
        peers: Peers,
        method: Method,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.peer_training = PeerTraining(peers, method, teacher)
        self._build_optimizer, self._build_scheduler = optimizer, scheduler
        self._metrics: PeerMetrics | None = None

    def configure_optimizers(self) -> Any:
        """Return the optimizer over peers and method, and its schedule.

        Raises:
            InputError: the schedule does not step once an epoch.
        """
        optimizer = self._build_optimizer(self.peer_training.trained_parameters())
        if self._build_scheduler is None:
            return optimizer
        scheduler = self._build_scheduler(optimizer)
        options = scheduler if isinstance(scheduler, dict) else {"scheduler": scheduler}
        if isinstance(options["scheduler"], torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError("scheduler: ReduceLROnPlateau steps on a figure, and PeerModule on epochs; build another")
        if options.get("interval", "epoch") != "epoch" or options.get("frequency", 1) != 1:
            raise InputError("scheduler: PeerModule steps it once an epoch; build one that counts epochs")
        return [optimizer], [scheduler]

    def on_fit_start(self) -> None:
        """Check that the method can be trained with so many processes.

        Raises:
            InputError: it needs the whole batch, or steps more than once a batch.
        """
        self.peer_training.check_loop(self.trainer.world_size, 1)

    def on_train_start(self) -> None:
        """Tell the method how many steps an epoch has.

        Raises:
            InputError: it has to know, and the loader has no length.
        """
        count = self.trainer.num_training_batches  # infinite where the data set has no length
        if count != float("inf"):
            self.peer_training.set_steps_per_epoch(int(count))
        elif self.peer_training.acts_at_epoch_ends:
            raise InputError(
                f"{self.peer_training.method.name} acts at certain steps of an epoch, and the loader has no length; "
                "give Trainer(limit_train_batches=...) the number of batches"
            )

    def training_step(self, batch: tuple[Any, Tensor], batch_index: int) -> Tensor:
        """Do one step of the method and return its loss."""
        inputs, targets_B = _split_batch(batch)
        optimizer: Any = self.optimizers()
        weight = self.peer_training.method.weight_at(self.current_epoch)
        if self.peer_training.method.update_mode == "alternating":
            total = torch.zeros((), device=self.device)
            for loss, parameters in self.peer_training.take_turns(inputs, targets_B, weight):
                optimizer.zero_grad()
                self.manual_backward(loss, inputs=parameters)
                optimizer.step()
                total = total + loss.detach()
        else:
            total = self.peer_training(inputs, targets_B, weight)["loss"]
            optimizer.zero_grad()
            self.manual_backward(total)
            with self.peer_training.keep_inactive(optimizer.optimizer):
                optimizer.step()
            self.peer_training.end_step()
        rows = targets_B.shape[-2 if targets_B.is_floating_point() else -1]
        self.log("train_loss", total.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=rows)
        return total.detach()

    def on_train_epoch_end(self) -> None:
        """Step the schedule."""
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def on_validation_epoch_start(self) -> None:
        """Begin new figures."""
        peers, method = self.peer_training.peers, self.peer_training.method
        self._metrics = PeerMetrics(peers.num_peers, peers.num_classes, method.group, self.device)

    def validation_step(self, batch: tuple[Any, Tensor], batch_index: int) -> None:
        """Add a batch to the figures."""
        assert self._metrics is not None
        inputs, targets_B = _split_batch(batch)
        outputs = self.peer_training.peers(inputs)
        self._metrics.update(outputs.logits_PBC, targets_B, self.peer_training.method.ensemble(outputs))

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the deployed member and of the ensemble."""
        self._log_figures("val")

    def on_test_epoch_start(self) -> None:
        """Begin new figures."""
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Any, Tensor], batch_index: int) -> None:
        """Add a batch to the figures."""
        self.validation_step(batch, batch_index)

    def on_test_epoch_end(self) -> None:
        """Log the figures of the deployed member and of the ensemble."""
        self._log_figures("test")

    def predict_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the deployed member's logits, `B x C`.

        Args:
            batch: A pair of inputs and labels, which are not read, or inputs.
            batch_index: Its number.
        """
        takes_tensors = self.peer_training.peers.num_input_axes is not None
        if isinstance(batch, tuple | list) and len(batch) == 2 and (takes_tensors or not isinstance(batch[0], Tensor)):
            batch = batch[0]
        return self(batch)

    def _log_figures(self, part: str) -> None:
        assert self._metrics is not None
        figures, deployed = self._metrics.compute(), self.peer_training.method.deployed
        logged = {"top1": figures["top1"][deployed], "nll": figures["nll"][deployed]}
        logged["ensemble_top1"] = figures["ensemble_top1"]
        self.log_dict({f"{part}_{name}": value for name, value in logged.items()}, prog_bar=True, sync_dist=True)

    def forward(self, inputs: Any) -> Tensor:
        """Return the deployed member's logits, `B x C`."""
        return self.peer_training(inputs)

    def student(self) -> nn.Module:
        """Return the one plain network that is deployed: a copy in evaluation mode."""
        return self.peer_training.student()


def _split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Return inputs and labels of a batch.

    Raises:
        InputError: it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        raise InputError(f"a batch is {kind}; PeerModule takes pairs of inputs and class numbers from the loader")
    return batch[0], batch[1]
