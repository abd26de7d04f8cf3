"""Peers, their method and their teachers as one module, for a loop of one's own or of another library.

Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from codistill.distributed import SingleProcess
from codistill.methods import Method, Terms, TrainingStep
from codistill.peers import BranchPeers, NetworkPeers, PeerOutputs, Peers, SnapshotTeacher, Views, device_of, eval_mode
from codistill.training.build import check_weights_can_be_averaged
from codistill.training.peer_step import forward_with_teachers, keep_inactive, make_mean_teacher, take_turns
from codistill.training.student import build_student
from codistill.utils import InputError


class PeerTraining(nn.Module):
    """All that a loop trains and saves: the peers, the method, and the teachers that the method needs.

    Its state dict holds the mean teachers and the number of steps too, so that training continues exactly. A step is

        terms = training(inputs, targets, weight=training.method.weight_at(epoch))
        terms["loss"].backward()
        optimizer.step()  # over training.trained_parameters()
        training.end_step()

    and for a method that updates one member after the other (`update_mode`) it is `take_turns`.

    Args:
        peers: `NetworkPeers` or `BranchPeers`.
        method: Built for them.
        teacher: A trained network, for kd; it is put in evaluation mode and not trained.
        steps_per_epoch: Optimizer steps of an epoch, where the method changes or copies weights at certain steps.

    Raises:
        InputError: the method needs a teacher, and none is given; or it alternates or averages weights, and the peers
            do not allow it.

    >>> import codistill as cd
    >>> peers = cd.NetworkPeers("resnet8", num_peers=2, num_classes=10, in_channels=1, image_size=8)
    >>> training = PeerTraining(peers, cd.methods.KDCL(2, own_views=False))
    >>> images, labels = torch.zeros(4, 1, 8, 8), torch.arange(4)
    >>> training(images, labels, weight=0.5)["loss_P"].shape, training(images).shape
    (torch.Size([2]), torch.Size([4, 10]))
    """

    def __init__(
        self, peers: Peers, method: Method, teacher: nn.Module | None = None, steps_per_epoch: int | None = None
    ) -> None:
        super().__init__()
        if "teacher" in method.needs and teacher is None:
            raise InputError(f"{method.name} needs a trained teacher; give a network as `teacher`")
        if method.update_mode == "alternating" and not isinstance(peers, NetworkPeers):
            raise InputError(
                f"{method.name} updates one member after the other, and branches share a trunk; build it with "
                'update="joint"'
            )
        if "rotations" in method.needs and peers.num_input_axes != 4:
            raise InputError(
                f"{method.name} turns images, and these peers take other inputs; build it with rotations=False"
            )
        if "previous" in method.needs:
            raise InputError(
                f"{method.name} sees the images of the step before again, which codistill's own loop keeps; train it "
                "with codistill.train"
            )
        if method.inner_interval:
            raise InputError(
                f"{method.name} tries steps and takes them back, as it is configured here, which codistill's own loop "
                "does; train it with codistill.train"
            )
        check_weights_can_be_averaged(method, peers, SingleProcess(torch.device("cpu"), peers.num_peers))
        self.peers, self.method = peers, method
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        if isinstance(peers, BranchPeers):
            peers.set_rescale(method.rescale_trunk)
        self.mean_teacher = make_mean_teacher(peers, method, steps_per_epoch or 1)
        self.steps_per_epoch = steps_per_epoch
        self.steps_done = 0
        """Optimizer steps so far. A number of the host, as the mean teachers' decay depends on it."""
        self.saved_steps: Tensor
        self.register_buffer("saved_steps", torch.zeros((), dtype=torch.int64))
        self.good: Tensor
        self.register_buffer("good", torch.ones((), dtype=torch.bool), persistent=False)  # no step is refused here
        self.register_state_dict_pre_hook(_write_steps)
        self.register_load_state_dict_post_hook(_read_steps)
        self.last_logits_BC: Tensor | None = None
        """The deployed member's logits of the last training batch, without their graph."""
        self._active_P: Tensor | None = None
        self._prepared: int | None = None
        self._awaits_holdout = "holdout" in method.needs

    def train(self, mode: bool = True) -> PeerTraining:
        """Set the mode of all but the trained teacher, which stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters for an optimizer: the peers' and the method's."""
        parameters = [*self.peers.trained_parameters(), *self.method.parameters()]
        return [parameter for parameter in parameters if parameter.requires_grad]

    @property
    def acts_at_epoch_ends(self) -> bool:
        """Whether the method copies or changes weights at steps that are counted in epochs."""
        if any(getattr(type(self.method), name) is not getattr(Method, name) for name in ("before_step", "after_step")):
            return True
        return self.method.snapshot_interval(1) != self.method.snapshot_interval(2)

    @property
    def counts_epochs(self) -> bool:
        """Whether the loss or the weights depend on the epoch: by a ramp, or by steps counted in epochs."""
        return self.acts_at_epoch_ends or self.method.weight_at(0) != self.method.weight_at(1_000_000)

    def set_steps_per_epoch(self, steps: int) -> None:
        """Set the number of optimizer steps of an epoch."""
        self.steps_per_epoch = steps
        if isinstance(self.mean_teacher, SnapshotTeacher):
            self.mean_teacher.interval = self.method.snapshot_interval(steps)

    def check_loop(self, processes: int, microbatches: int) -> None:
        """Check that a loop can train the method.

        Args:
            processes: Number of processes, each with its own part of the batch, that average their gradients.
            microbatches: Number of batches whose gradients are added up before a step.

        Raises:
            InputError: the method needs the whole batch in one forward pass, or steps more than once a batch.
        """
        alternating = self.method.update_mode == "alternating"
        for count, what in ((processes, "processes"), (microbatches, "batches a step (gradient accumulation)")):
            if count > 1 and alternating:
                raise InputError(
                    f"{self.method.name} updates one member after the other, which {count} {what} cannot; "
                    'build it with update="joint", or train with one'
                )
            if count > 1 and self.method.needs_full_batch:
                raise InputError(
                    f"{self.method.name} needs the whole batch at once as it is configured here, which {count} {what} "
                    "split; train with one"
                )

    @overload
    def forward(self, inputs: Any, targets_B: Tensor, weight: float = 1.0) -> Terms: ...
    @overload
    def forward(self, inputs: Any, targets_B: None = None, weight: float = 1.0) -> Tensor: ...
    def forward(self, inputs: Any, targets_B: Tensor | None = None, weight: float = 1.0) -> Terms | Tensor:
        """Return the method's terms; without targets the deployed member's logits, `B x C`.

        The loss is computed outside autocast, like the heads.

        Args:
            inputs: What the networks take, for all peers (a tensor, or a mapping or tuple of tensors); or a list of as
                many as there are peers. Images `B x C x H x W` may be stacked to one tensor instead.
            targets_B: Class numbers, or soft labels `B x C`; one more axis in front where each has its own samples
                (codistillation with partition="disjoint").
            weight: The ramp's value, `method.weight_at(epoch)`.

        Raises:
            InputError: the method trains on a view of its own for every peer, and there is only one.
        """
        views = self._as_views(inputs)
        if targets_B is None:
            return self.peers(views).logits_PBC[self.method.deployed]
        outputs = self._outputs(views)
        with torch.autocast(device_of(views[0]).type, enabled=False):
            terms = self.method(outputs, targets_B, weight)
        self.last_logits_BC = outputs.logits_PBC[self.method.deployed].detach()
        self._active_P = terms.get("active_P") if self.method.pauses_members else None
        return terms

    def take_turns(
        self, inputs: Any, targets_B: Tensor, weight: float = 1.0
    ) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Yield the loss and the parameters of one member after the other, for a method that alternates; ends the step.

        The caller steps on each pair before it asks for the next:

            for loss, parameters in training.take_turns(inputs, targets, weight):
                optimizer.zero_grad()
                loss.backward(inputs=parameters)
                optimizer.step()

        One optimizer over all parameters does, as it leaves alone what has no gradient.

        Args:
            inputs: As in `forward`.
            targets_B: As in `forward`.
            weight: As in `forward`.
        """
        assert isinstance(self.peers, NetworkPeers)  # checked at the start
        views = self._as_views(inputs)
        live = self._outputs(views)
        turns = take_turns(self.peers, self.method, live, views, targets_B, weight)
        for p in range(self.peers.num_peers):
            terms = next(turns)
            yield terms["loss_P"][p], [q for q in self.peers.member(p).parameters() if q.requires_grad]
        self.end_step()

    def keep_inactive(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Return a context within which the optimizer steps after `forward`; members that pause (switokd) stay as is.

        Args:
            optimizer: It makes the step.
        """
        members = [(p, self.peers.member(p)) for p in range(self.peers.num_peers)]
        return keep_inactive(members, optimizer, self._active_P)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each step of an optimizer end the training step, where another library makes it; nothing else does then.

        Args:
            optimizer: Over `trained_parameters()`; its hooks are used.

        Raises:
            InputError: the method steps more than once a batch.
        """
        if self.method.update_mode == "alternating":
            raise InputError(f"{self.method.name} steps once for each member; use take_turns")
        pausing = ExitStack()

        def before(*_: Any) -> None:
            pausing.enter_context(self.keep_inactive(optimizer))

        def after(*_: Any) -> None:
            pausing.close()
            self.end_step()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def end_step(self) -> None:
        """Let the method and the mean teachers change weights after an optimizer step, and count it."""
        self.method.after_step(self.peers, self._step(self.good))
        if self.mean_teacher is not None:
            self.mean_teacher.update(self.peers, self.steps_done)
        self.steps_done += 1
        if self._awaits_holdout and self.steps_per_epoch and self.steps_done > self.steps_per_epoch:
            self._warn_of_holdout()

    @torch.no_grad()
    def update_on_holdout(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Let the method update its own state after an epoch (kdcl's target general).

        Args:
            batches: Pairs of inputs and class numbers that are not trained on.

        Raises:
            InputError: there is no batch.
        """
        self._awaits_holdout = False
        with eval_mode(self.peers):
            pairs = [(self.peers(self._as_views(inputs)).logits_PBC, targets_B) for inputs, targets_B in batches]
        if not pairs:
            raise InputError(f"{self.method.name}: update_on_holdout got no batch; give pairs of inputs and targets")
        logits, targets = zip(*pairs, strict=True)
        self.method.update_on_holdout(torch.cat(logits, 1), torch.cat(targets))

    def student(self, kind: Literal["member", "ema", "ensemble"] = "member") -> nn.Module:
        """Return what is deployed, as one network in evaluation mode: a copy that needs nothing of this module.

        Args:
            kind: The deployed member, its mean teacher (pcl), or the ensemble, which holds the peers themselves.
        """
        if kind == "ema" and (self.mean_teacher is None or isinstance(self.mean_teacher, SnapshotTeacher)):
            raise InputError(f"{self.method.name} has no mean teachers; deploy a member or the ensemble")
        if self._awaits_holdout and self.steps_done:
            self._warn_of_holdout()
        return build_student("" if kind == "member" else kind, self.peers, self.method, self.mean_teacher)

    def _warn_of_holdout(self) -> None:
        """Warn, once, that the method goes without what it would learn from held-out samples."""
        self._awaits_holdout = False
        warnings.warn(
            f"{self.method.name} learns from held-out samples after every epoch, as it is configured here, and got "
            "none; call update_on_holdout(batches) of the PeerTraining",
            stacklevel=3,
        )

    def _step(self, good: Tensor | None = None) -> TrainingStep:
        """Return where in training this step is."""
        count = self.steps_per_epoch
        if count is None and self.acts_at_epoch_ends:
            raise InputError(f"{self.method.name} acts at certain steps of an epoch; give `steps_per_epoch`")
        epoch, step = divmod(self.steps_done, count or 1)
        return TrainingStep(self.steps_done, epoch, ends_epoch=step + 1 == count, good=good)

    def _outputs(self, views: Views) -> PeerOutputs:
        if self.training and self._prepared != self.steps_done:  # once a step, also where gradients are added up
            self.method.before_step(self.peers, self._step())
            self._prepared = self.steps_done
        if "views" in self.method.needs and len(views) != self.method.num_views and self.training:
            other = 'partition="same"' if "partition" in self.method.needs else "own_views=False"
            raise InputError(
                f"{self.method.name} trains on a view of its own for every peer; give a list of "
                f"{self.method.num_views} inputs, or build it with {other}"
            )
        return forward_with_teachers(self.peers, self.method, views, self.mean_teacher, self.teacher)

    def _as_views(self, inputs: Any) -> Views:
        if isinstance(inputs, Tensor):
            return inputs.unsqueeze(0) if inputs.dim() == self.peers.num_input_axes else inputs
        inputs = self.peers.tuples_of(inputs)
        return inputs if isinstance(inputs, list) else [inputs]


def _write_steps(training: nn.Module, *_: Any) -> None:
    assert isinstance(training, PeerTraining)
    training.saved_steps.fill_(training.steps_done)


def _read_steps(training: nn.Module, _incompatible: Any) -> None:
    assert isinstance(training, PeerTraining)
    training.steps_done = int(training.saved_steps)
    if training.steps_done:  # whoever trained it has updated the method or was warned
        training._awaits_holdout = False
