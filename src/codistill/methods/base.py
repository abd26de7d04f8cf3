"""The contract between a method and everything else.

A method is a small `nn.Module`. Its `forward(outputs, targets, weight)` takes the outputs of the peers for a batch and
returns a dict: `loss` (on which backward is called), `loss_P` (each member's own loss; `loss` is their sum, plus terms
that belong to no member, such as an ensemble's cross-entropy), `ce_P` and `distill_P` (its unweighted parts),
`active_P` (bool, only where not all members step: who does), and, detached and for inspection only, `targets_PBC`
(softened log-probabilities) and the method's own weights. It knows no loop, optimizer, device, data set or logger.

Shapes: P peers, B batch, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

import torch
from torch import Tensor, nn

from codistill.config import METHODS, DivergenceConfig, MethodConfig
from codistill.data import NUM_ROTATIONS
from codistill.losses import sigmoid_ramp
from codistill.methods.training_step import TrainingStep
from codistill.peers import Inputs, PeerOutputs, Peers, Views
from codistill.utils import InputError

Terms = dict[str, Tensor]

OUTPUTS_BY_NEED = {
    "trunk": ("trunk_BD", "the shared trunk's output; use BranchPeers (--topology branches) with one view"),
    "ema": ("ema_logits_PBC", "the mean teachers' logits; fill PeerOutputs.ema_logits_PBC from a MeanTeacher"),
    "teacher": ("teacher_logits_BC", "a trained teacher; give --method.teacher, or fill PeerOutputs.teacher_logits_BC"),
    "exits": ("exits", "the networks' exits; build NetworkPeers with exits=E"),
    "maps": ("maps", "the networks' last maps; build NetworkPeers with maps=M"),
    "features": ("features", "the peers' features; fill PeerOutputs.features, one B x D tensor per peer"),
    "partition": (
        "others_logits_QPBC",
        "what the others' snapshots give for each peer's images; fill it from SnapshotTeacher.outputs_of_others",
    ),
    "hybrid": ("hybrid_logits_BC", "the logits of the averaged weights; fill PeerOutputs.hybrid_logits_BC"),
}


@dataclass(frozen=True)
class PeerInfo:
    """What a method knows of the peers when it is built.

    >>> from codistill.peers import NetworkPeers
    >>> info = PeerInfo.of(NetworkPeers("resnet8", num_peers=2, num_classes=10, image_size=8))
    >>> info.num_peers, info.num_classes, info.feature_dims, info.trunk_dim, info.exit_dims
    (2, 10, (64, 64), None, ((), ()))
    """

    num_peers: int
    num_classes: int
    feature_dims: tuple[int, ...]
    trunk_dim: int | None = None
    seed: int = 0
    exit_dims: tuple[tuple[int, ...], ...] = ()
    """Widths of every peer's exits."""
    map_shapes: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    """Shapes C, H, W of the maps of every peer's last stages."""

    @classmethod
    def of(cls, peers: Peers, seed: int = 0) -> PeerInfo:
        """Return the description of built peers."""
        widths, exits, maps = tuple(peers.feature_dims), tuple(peers.exit_dims), tuple(peers.map_shapes)
        return cls(peers.num_peers, peers.num_classes, widths, peers.trunk_dim, seed, exits, maps)


class Method(nn.Module):
    """Base of all methods; see the module's docstring for the contract.

    Args:
        num_peers: Members P.

    >>> from codistill.losses import cross_entropy
    >>> class Alone(Method):
    ...     name = "alone"
    ...     def forward(self, outputs, targets_B, weight=1.0):
    ...         ce_P = cross_entropy(outputs.logits_PBC, targets_B)
    ...         return combine_terms(ce_P, torch.zeros_like(ce_P), weight)
    >>> from codistill.peers import PeerOutputs
    >>> Alone(num_peers=2)(PeerOutputs(torch.zeros(2, 4, 10), []), torch.arange(4))["loss_P"]
    tensor([2.3026, 2.3026])
    """

    name: ClassVar[str]
    citation: ClassVar[str]
    update_mode: Literal["joint", "alternating"] = "joint"
    """`joint` (one step for all members) or `alternating` (one after the other, each on new outputs of the others)."""
    rescale_trunk: bool = False
    """Whether each fork divides the gradient that enters the trunk by its number of children."""
    weight: float = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: float = 0.0
    """Length of the ramp in epochs; 0 means no ramp."""
    ema_decay: float = 0.0
    """Largest decay of the mean teachers' moving average, for a method that needs them."""
    needs_full_batch: bool = False
    """Whether the loss is not a mean over samples (it uses batch statistics, or one random draw per batch), so that
    processes that split a batch must each gather the whole batch's outputs."""
    exchanges_snapshots: bool = False
    """Whether a member learns from its own outputs and the others' snapshots alone, so that processes exchange the
    snapshots' weights when these are taken, and no outputs."""
    pauses_members: bool = False
    """Whether `active_P` is among the terms; the others keep their weights and the optimizer's state."""
    mixes_weights: bool = False
    """Whether the members' weights are averaged, which takes networks of one architecture, all in each process."""
    hybrid_has_gradient: bool = True
    """Whether the loss has a gradient by the hybrid's logits, for a method that needs them."""
    remembers_batches: bool = False
    """Whether `forward` in training changes the method's own state, so that it may run once per batch only."""
    inner_interval: int = 0
    """Batches from one call of `run_inner_steps` to the next, from an epoch's first batch on; 0: there is none."""
    holdout_fraction: float = 0.0
    """Fraction of the training set that is held out, for a method that needs it."""
    targets_checked: bool = False
    """Whether targets need no check (any more). They are checked at the first call alone, as that waits for a GPU."""

    def __init__(self, num_peers: int) -> None:
        super().__init__()
        self.num_peers = num_peers
        self.needs: frozenset[str] = frozenset()
        """What the training loop must provide, of features, trunk, views, ema, teacher, holdout, hybrid (the logits of
        the averaged weights, `codistill.peers.hybrid_logits`, on a view of its own where there are views), exits, maps,
        previous (the outputs for the images of the step before, `PeerOutputs.previous`), partition (a part of the
        training images for every member: the views show other images, the targets are `P x B` or `P x B x C`, and of
        snapshots the others' logits are given, `PeerOutputs.others_logits_QPBC`),
        rotations (rows 4 b to 4 b + 3 of all outputs are of image b, see `codistill.data.rotate_images`)."""
        self.deployed = 0
        """Index of the member that is deployed, declared before training."""
        self.group = tuple(range(num_peers))
        """The members whose ensemble and diversity are reported (okddip excludes its leader)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(mode := vars(cls).get("update"), str):  # a class that uses the old name
            del cls.update
            cls.update_mode = mode  # pyrefly: ignore
        config = vars(cls).get("Config")
        if isinstance(config, type) and issubclass(config, MethodConfig):
            config.method_class, config.import_name = cls, _import_name(cls)
            if isinstance(name := getattr(cls, "name", None), str):
                config.name = name

    @property
    def update(self) -> Literal["joint", "alternating"]:
        """Old name of `update_mode`."""
        return self.update_mode

    @update.setter
    def update(self, mode: Literal["joint", "alternating"]) -> None:
        self.update_mode = mode

    @classmethod
    def config_class(cls) -> type[MethodConfig]:
        """Return the class of an own method's options, `Config`.

        Raises:
            InputError: the method lacks its name, `forward` or `Config`.
        """
        where, config = _import_name(cls), vars(cls).get("Config")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name.strip():
            raise InputError(f'method {where} has no name; set `name = "..."` on the class')
        if name in METHODS:
            raise InputError(f"method {where}: codistill has a method called {name}; set another `name`")
        if cls.forward is Method.forward:
            raise InputError(f"method {where} has no `forward`; write one: (outputs, targets_B, weight) -> terms")
        if not (isinstance(config, type) and issubclass(config, MethodConfig)) or not dataclasses.is_dataclass(config):
            raise InputError(f"method {where} has no options; add a dataclass `class Config(MethodConfig)` to it")
        if "__dataclass_fields__" not in vars(config):
            raise InputError(f"method {where}: decorate its Config with @dataclass(kw_only=True)")
        return config

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method from its config; overridden where the number of peers is not all it needs to know."""
        return cls(num_peers=info.num_peers, **dataclasses.asdict(config))

    def weight_at(self, epoch: float) -> float:
        """Return the ramp's value in an epoch; epochs are counted from 0.

        A method that is built by hand does not know the length of the run: its ramp lasts `ramp_epochs` (80 where it is
        not given, as in the papers' runs of 300 epochs), so give `ramp_epochs` in a shorter run of your own.

        >>> import codistill as cd
        >>> f"{cd.methods.OKDDip(4, 64).weight_at(9):.3f}, {cd.methods.OKDDip(4, 64, ramp_epochs=3).weight_at(9):.3f}"
        '0.019, 1.000'
        """
        return sigmoid_ramp(epoch, self.ramp_epochs)

    @property
    def num_views(self) -> int:
        """Views of each image, 1, or one per member, and then one for the hybrid where it is needed.

        A method that needs the images of the step before gets 2: one for this step, and one for the next.
        """
        if "views" in self.needs:
            return self.num_peers + ("hybrid" in self.needs)
        return 2 if "previous" in self.needs else 1

    @property
    def rows_per_image(self) -> int:
        """Rows of the outputs for each image and label, 1, or 4 rotations, of which the first is upright."""
        return NUM_ROTATIONS if "rotations" in self.needs else 1

    def hybrid_shares(self) -> Tensor | None:
        """Return the members' shares in the hybrid's weights, `P`, the same tensor at every step; None: 1/P each."""
        return None

    def before_step(self, peers: Peers, step: TrainingStep) -> None:
        """Prepare a step, outside of any captured graph; by default do nothing."""

    def run_inner_steps(self, peers: Peers, views: Views, targets_B: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Learn the method's own state from steps that are tried on a batch, after the step on it; none by default.

        Weights, running statistics and the optimizer stay as they are. Called at every `inner_interval`-th batch of an
        epoch, the first included, in one process only.

        Args:
            peers: What is trained.
            views: The batch, as the peers take it.
            targets_B: Its labels.
            optimizer: Over all that is trained.
        """

    def after_step(self, peers: Peers, step: TrainingStep) -> None:
        """Change the peers' weights after the optimizers' step, without waiting for the device; by default do nothing.

        The optimizers' state stays as it is.

        Args:
            peers: What is trained; on a mesh the members of this process, `peers.local`.
            step: Where in the run this is, and whether the step was made.
        """

    def snapshot_interval(self, steps_per_epoch: int) -> int:
        """Return the steps between two snapshots of the peers that teach them; 0: the teachers are moving averages."""
        return 0

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms of the loss; `weight` is the ramp's value, from `weight_at`."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        """Return the terms of the loss; see `forward`.

        Raises:
            InputError: the targets of the first call are neither class numbers nor soft labels (see `check_targets`).
        """
        if not self.targets_checked:
            arguments = {**dict(zip(("outputs", "targets_B"), args)), **kwargs}
            if isinstance(arguments.get("outputs"), PeerOutputs) and "targets_B" in arguments:
                self._check_targets(arguments["outputs"].logits_PBC, arguments["targets_B"])
            self.targets_checked = True
        return super().__call__(*args, **kwargs)

    def _check_targets(self, logits_PBC: Tensor, targets: Any) -> None:
        """Check the labels of a batch, those of every member where each has its own images."""
        if "partition" not in self.needs:
            check_targets(self._upright(logits_PBC, targets), targets)
            return
        if not isinstance(targets, Tensor) or targets.shape[:2] != logits_PBC.shape[:2]:
            shape = " x ".join(map(str, targets.shape)) if isinstance(targets, Tensor) else type(targets).__name__
            raise InputError(
                f"{self.name} trains every peer on its own images; give it targets of each, "
                f"{' x '.join(map(str, logits_PBC.shape[:2]))} class numbers, not {shape or 'one number'}"
            )
        for p, own in enumerate(targets):
            check_targets(logits_PBC[p : p + 1], own)

    def _upright(self, logits_PBC: Tensor, targets: Any) -> Tensor:
        """Return the logits of the images as they are, without those of their rotations."""
        count = self.rows_per_image
        if count > 1 and isinstance(targets, Tensor) and targets.dim() and logits_PBC.shape[1] != count * len(targets):
            raise InputError(
                f"{self.name} needs each image in {count} rotations; give codistill.data.rotate_images(images) to the "
                "peers"
            )
        return logits_PBC[:, ::count]

    def check(self, outputs: PeerOutputs) -> None:
        """Raise InputError if `outputs` lacks something that the method needs; the message says how to provide it."""
        wanted = self.needs - {"ema"} if "partition" in self.needs else self.needs  # whose logits are among the others'
        for need in wanted & OUTPUTS_BY_NEED.keys():
            name, what = OUTPUTS_BY_NEED[need]
            value = getattr(outputs, name)
            if value is None or (need in ("features", "exits", "maps") and len(value) != self.num_peers):
                raise InputError(f"{self.name} needs {what}")
        if outputs.logits_PBC.shape[0] != self.num_peers:
            raise InputError(f"{self.name} was built for {self.num_peers} peers, not {outputs.logits_PBC.shape[0]}")

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Return the ensemble's log-probabilities, `B x C`; by default of the mean of the group's probabilities."""
        log_probs_PBC = outputs.logits_PBC.log_softmax(-1)
        if len(self.group) < self.num_peers:
            log_probs_PBC = torch.stack([log_probs_PBC[p] for p in self.group])
        return torch.logsumexp(log_probs_PBC, 0).log_softmax(-1)

    def update_on_holdout(self, holdout_logits_PNC: Tensor, holdout_targets_N: Tensor) -> None:
        """Update the method's own state from the outputs on the holdout, once per epoch."""

    def deploy(self, peers: Peers) -> nn.Module:
        """Return the one plain network that is deployed, in evaluation mode."""
        return peers.export_member(self.deployed).eval()

    def deploy_ensemble(self, peers: Peers) -> nn.Module:
        """Return the ensemble as one network that returns log-probabilities, at the cost of all its members.

        It holds the peers themselves (where they have exits, a copy without those). Evaluation mode is left to the
        caller, who may go on training them.
        """
        return Ensemble(peers.without_exits(), self)


def check_targets(logits_PBC: Tensor, targets: Any) -> None:
    """Check the labels of a batch.

    Args:
        logits_PBC: The peers' logits.
        targets: What must be class numbers `B`, int64 from 0 to C - 1, or soft labels `B x C`, whose rows sum to 1.

    Raises:
        InputError: they are neither.

    >>> check_targets(torch.zeros(2, 3, 10), torch.tensor([0, 9, 4]))
    """
    if not isinstance(targets, Tensor):
        raise InputError(f"the targets are a {type(targets).__name__}; give a tensor of class numbers, int64")
    batch, classes = logits_PBC.shape[-2:]
    shape = " x ".join(map(str, targets.shape))
    if targets.is_floating_point():
        if targets.shape != (batch, classes):
            raise InputError(
                f"the targets are {targets.dtype} of shape {shape or 'one number'}; give class numbers (int64, "
                f"{batch}) or soft labels ({batch} x {classes})"
            )
        rows = targets.detach().double().cpu() if targets.device.type != "mps" else targets.detach().cpu().double()
        if not bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 0.02).all()):
            raise InputError(
                "the targets are no soft labels: their rows must be 0 or more and sum to 1 (several labels an image "
                "are not supported)"
            )
        return
    if targets.dtype != torch.int64:
        raise InputError(f"the targets are {targets.dtype}; give class numbers as int64 (targets.long())")
    if targets.shape != (batch,):
        raise InputError(f"the targets are of shape {shape or 'one number'}; give one class number a sample ({batch})")
    low, high = (int(bound) for bound in targets.aminmax()) if batch else (0, 0)
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise InputError(
            f"a target is {wrong}, which is none of the {classes} classes; they count from 0 to {classes - 1}"
        )


class Ensemble(nn.Module):
    """Peers and their method, as a network from what the peers take to the ensemble's log-probabilities.

    It takes a mapping or tuple of tensors as one argument, as the peers do.
    """

    def __init__(self, peers: Peers, method: Method) -> None:
        super().__init__()
        self.peers, self.method = peers, method

    def forward(self, inputs: Inputs) -> Tensor:
        """Return `B x C` log-probabilities."""
        return self.method.ensemble(self.peers(inputs))


def _import_name(cls: type) -> str:
    """Return the package.module:Class of a class; the module of a script is its file's name."""
    module = cls.__module__
    if module in ("__main__", "__mp_main__"):
        main = sys.modules[module]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else Path(file).stem if file else module
    return f"{module}:{cls.__qualname__}"


def combine_terms(
    ce_P: Tensor, distill_P: Tensor, weight: float, *, ce_weight: float = 1.0, **extras: Tensor | None
) -> Terms:
    """Return the terms of the loss, with `loss_P = ce_weight * ce_P + weight * distill_P`.

    Args:
        ce_P: Cross-entropy of every member.
        distill_P: Its distillation term.
        weight: Weight of that term.
        ce_weight: Weight of the cross-entropy.
        extras: Tensors for inspection, which are detached; None is left out.

    >>> combine_terms(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]), weight=2.0)["loss_P"]
    tensor([2., 3.])
    """
    loss_P = (ce_P if ce_weight == 1.0 else ce_weight * ce_P) + weight * distill_P
    terms = {"loss": loss_P.sum(), "loss_P": loss_P, "ce_P": ce_P.detach(), "distill_P": distill_P.detach()}
    return terms | {name: value.detach() for name, value in extras.items() if value is not None}


def takes_options(config: type[MethodConfig], without: Sequence[str] = ()) -> Callable[[Callable], Callable[..., None]]:
    """Replace the argument `options` of an `__init__` by the fields of a method's config (a decorator).

    So the defaults are written in the config only; `inspect.signature` and `help` show them as arguments. Those of
    `DivergenceConfig`, which many methods share, are keywords only.

    Args:
        config: The class of `options`.
        without: Fields that do not become arguments.

    >>> from codistill.config import ONEConfig
    >>> class Half(Method):
    ...     @takes_options(ONEConfig)
    ...     def __init__(self, num_peers, options):
    ...         super().__init__(num_peers)
    ...         self.temperature = options.temperature / 2
    >>> Half(3, temperature=4.0).temperature
    2.0
    """
    fields = [field for field in dataclasses.fields(config) if field.name not in without]
    shared = {field.name for field in dataclasses.fields(DivergenceConfig)}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    types = get_type_hints(config)
    arguments = [
        inspect.Parameter(f.name, kinds[f.name in shared], default=f.default, annotation=types[f.name]) for f in fields
    ]

    def decorate(init: Callable) -> Callable[..., None]:
        parameters = []
        for parameter in inspect.signature(init).parameters.values():
            parameters += arguments if parameter.name == "options" else [parameter]
        parameters.sort(key=lambda parameter: parameter.kind)  # keywords last
        signature = inspect.Signature(parameters)

        @functools.wraps(init)
        def init_with_options(*args: Any, **kwargs: Any) -> None:
            given = signature.bind(*args, **kwargs).arguments
            options = {f.name: given.pop(f.name) for f in fields if f.name in given}
            init(**given, options=config(**options))

        init_with_options.__signature__ = signature  # pyrefly: ignore
        return init_with_options

    return decorate
