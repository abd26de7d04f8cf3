"""Peers in the `Trainer` of transformers, for text and images.

The trainer's model is a `PeerTraining`: a checkpoint holds peers, method and mean teachers, and
`resume_from_checkpoint` continues exactly. Batches are mappings, as the trainer's collators make them: `labels` go to
the method, and all else to the networks as keywords; a single tensor (pixel_values) is passed as it is to peers that
take one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codistill.methods import Method
from codistill.peers import Peers
from codistill.training import PeerTraining
from codistill.utils import InputError

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import has_length
except ImportError:
    raise InputError(
        "codistill.integrations.PeerTrainer needs: pip install 'transformers[torch]' (with accelerate)"
    ) from None


class PeerTrainer(Trainer):
    """Trains peers with the trainer's schedule, precision, logging and checkpoints.

    Evaluation judges the deployed member: `eval_loss` is its cross-entropy, and `compute_metrics` gets its logits.

    Args:
        peers: `NetworkPeers` or `BranchPeers`, built with an `example` of what their networks take.
        method: Built for them; it updates all members at once.
        args: The trainer's arguments. `remove_unused_columns` is turned off, because the networks are inside the peers:
            a data set must hold only what the networks take, and `labels`.
        teacher: A trained network, for kd.
        options: Further arguments of `Trainer` (train_dataset, eval_dataset, data_collator, compute_metrics, ...).

    Raises:
        InputError: the method steps one member after the other, or cannot train these peers (see `PeerTraining`), or
            not with so many processes or accumulated batches; or an argument asks for another model or loss.

    >>> import codistill as cd
    >>> peers = cd.NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8)
    >>> method = cd.methods.KDCL(num_peers=2, own_views=False)
    >>> trainer = PeerTrainer(peers, method, TrainingArguments("runs/trainer", report_to="none", use_cpu=True))
    >>> trainer.student()(torch.zeros(4, 3, 8, 8)).shape  # after trainer.train()
    torch.Size([4, 10])
    """

    def __init__(
        self, peers: Peers, method: Method, args: TrainingArguments, teacher: nn.Module | None = None, **options: Any
    ) -> None:
        _check_arguments(args, options)
        args.remove_unused_columns = False
        args.label_names = ["labels"] if args.label_names is None else args.label_names
        self.peer_training = PeerTraining(peers, method, teacher)
        if method.update_mode == "alternating":
            raise InputError(
                f'{method.name} updates one member after the other, which Trainer cannot; build it with update="joint"'
            )
        self.peer_training.check_loop(args.world_size, args.gradient_accumulation_steps)
        super().__init__(model=self.peer_training, args=args, **options)
        self.add_callback(_FollowSteps(self.peer_training, args.gradient_accumulation_steps))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the method's loss; in evaluation the deployed member's cross-entropy, with its logits on request."""
        if "labels" not in inputs:
            raise InputError(f"a batch holds {', '.join(inputs)}; PeerTrainer takes class numbers by the name labels")
        batch, labels = self._as_input(inputs), inputs["labels"]
        if model.training:
            training = self.peer_training
            epoch = training.steps_done // (training.steps_per_epoch or 1)
            return model(batch, labels, weight=training.method.weight_at(epoch))["loss"]
        logits: Tensor = model(batch)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the loss, the deployed member's logits, and the labels; without labels the logits alone."""
        if "labels" in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = self._as_input(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            logits: Tensor = model(batch)
        return None, None if prediction_loss_only else logits, None

    def _as_input(self, inputs: Any) -> Any:
        """Return what the networks take of a batch: its columns but the labels, or the only one of these."""
        columns = {name: column for name, column in inputs.items() if name != "labels"}
        if self.peer_training.peers.num_input_axes is None:
            return columns
        if len(columns) != 1:
            raise InputError(
                f"a batch holds {', '.join(columns) or 'nothing'} beside labels, and the networks take one tensor; "
                "leave one column, or build the peers with a mapping as `example`"
            )
        return next(iter(columns.values()))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint's weights; what branches share is written for each, as safetensors shares no memory."""
        state = self.peer_training.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: value.clone() for name, value in state.items()})

    def student(self) -> nn.Module:
        """Return the one plain network that is deployed: a copy in evaluation mode."""
        return self.peer_training.student()


def _check_arguments(args: TrainingArguments, options: dict[str, Any]) -> None:
    """Raise where arguments ask for what peers and their method decide, or what takes a model of transformers.

    Raises:
        InputError: they do.
    """
    if options.get("model") is not None or options.get("model_init") is not None:
        raise InputError("PeerTrainer trains the peers; leave model and model_init out")
    if options.get("compute_loss_func") is not None:
        raise InputError("compute_loss_func: the method makes the loss; leave it out, or write a method")
    if args.label_smoothing_factor:
        raise InputError(
            "label_smoothing_factor is not applied to the loss of a method; set it to 0, and let the data collator "
            "give soft labels"
        )
    if args.gradient_checkpointing:
        raise InputError(
            "gradient_checkpointing takes a model of transformers; leave it out, and set checkpoint_activations = True "
            "on every peers.member(p)"
        )
    if args.neftune_noise_alpha is not None:
        raise InputError("neftune_noise_alpha takes a model of transformers; leave it out")


class _FollowSteps(TrainerCallback):
    """Ends the training step after each step of the optimizer."""

    def __init__(self, training: PeerTraining, microbatches: int) -> None:
        self.training, self.microbatches = training, microbatches
        self.followed: torch.optim.Optimizer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Tell the method how many steps an epoch has, and follow the optimizer."""
        if has_length(more["train_dataloader"]):
            self.training.set_steps_per_epoch(max(-(-len(more["train_dataloader"]) // self.microbatches), 1))
        elif self.training.counts_epochs:
            raise InputError(
                f"{self.training.method.name} counts epochs, and the training data set has no length; "
                "define its __len__"
            )
        optimizer = getattr(more["optimizer"], "optimizer", more["optimizer"])  # accelerate wraps it
        if optimizer is not self.followed:
            self.followed = optimizer
            self.training.attach(optimizer)
