"""What the options of all methods have in common."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from codistill.config.ranges import EACH_AT_LEAST_0
from codistill.utils import InputError

if TYPE_CHECKING:
    from codistill.config.options import Options


Topology = Literal["networks", "branches", "twins"]


@dataclass(kw_only=True)
class MethodConfig:
    """What all methods have in common."""

    name: ClassVar[str]
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 2
    max_peers: ClassVar[int | None] = None
    min_peers_note: ClassVar[str] = ""
    """Follows the minimum in an error message, where the number needs an explanation."""
    topologies: ClassVar[tuple[Topology, ...]] = ("networks", "branches")
    """The topologies that the method supports; the first is its default."""
    keeps_ema: ClassVar[bool] = False
    """Whether there are mean teachers (moving averages of the peers), which can be deployed."""
    same_start: ClassVar[bool] = False
    """Whether whole networks begin with the same weights, for a method that averages them."""
    import_name: ClassVar[str] = ""
    """An own method's package.module:Class, which the command line and files name it by; set by its class."""
    method_class: ClassVar[Any] = None
    """An own method's class; set by it."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle an own method's options by its name: another process finds its module in the working folder too."""
        if not self.import_name:
            return super().__reduce__()
        from codistill.config.methods import restore_config

        return restore_config, (self.import_name, vars(self))

    def default_ramp(self, epochs: int) -> float:
        """Return the default length of the weight's ramp, in epochs: 80 of 300, scaled to the length of the run."""
        return epochs * 80 / 300

    def needs_holdout(self) -> bool:
        """Return whether a part of the training set, `holdout_fraction`, is held out for the method."""
        return False

    def num_exits(self) -> int:
        """Return the exits that every network has in training: classifiers of its intermediate maps."""
        return 0

    def num_maps(self) -> int:
        """Return how many sizes of intermediate maps every network gives in training, the last ones."""
        return 0

    def ramp_length(self, epochs: int = 300) -> float:
        """Return the length of the weight's ramp in a run of so many epochs; 0 means no ramp."""
        length = getattr(self, "ramp_epochs", 0.0)  # most methods have this field, but not all
        return self.default_ramp(epochs) if length is None else length

    def resolved(self, epochs: int) -> Self:
        """Return a copy with the length of the ramp filled in, for a method that has one."""
        ramp = {"ramp_epochs": self.ramp_length(epochs)} if hasattr(self, "ramp_epochs") else {}
        return dataclasses.replace(self, **ramp)

    def check(self, options: Options) -> None:
        """Check the method's options against all options of a run, topology included; ranges are checked elsewhere.

        Raises:
            InputError: two options contradict each other.
        """


@dataclass(kw_only=True)
class DivergenceConfig(MethodConfig):
    """What methods have in common whose students learn from a target."""

    divergence: Literal["kl", "dkd", "dist", "reverse_kl", "js", "mse"] = "kl"
    """What compares student and target: the method's own KL, decoupled KL, correlation, KL(student || target),
    Jensen-Shannon, or squared differences of centered logits."""
    standardize_logits: bool = False
    """Standardize the logits of student and target before they are softened, so that their scale does not count."""
    divergence_weights: Annotated[tuple[float, ...], EACH_AT_LEAST_0] = ()
    """Weights of dkd (own class, others; 1 8) or dist (classes, samples; 1 1)."""

    def check(self, options: Options) -> None:
        """Refuse soft labels for dkd, and weights that a divergence does not have."""
        soft = next((name for name in ("label_smoothing", "mixup", "cutmix") if getattr(options, name)), None)
        if soft is not None and self.divergence == "dkd":
            raise InputError(
                f"--{soft.replace('_', '-')} makes labels soft, and --method.divergence dkd reads one hard label each; "
                "drop one of the two"
            )
        if self.divergence_weights and self.divergence not in ("dkd", "dist"):
            raise InputError(
                f"--method.divergence-weights are those of dkd or dist; --method.divergence {self.divergence} has none"
            )
        if self.divergence_weights and len(self.divergence_weights) != 2:
            raise InputError("--method.divergence-weights takes two numbers, as in --method.divergence-weights 1 8")


@dataclass(kw_only=True)
class TeacherConfig(MethodConfig):
    """What methods have in common that learn from a network trained before."""

    teacher: str | None = None
    """The teacher: a run folder, an exported .safetensors, or a state dict (.pt, .pth) of --method.teacher-model."""
    teacher_model: str | None = None
    """Network of a teacher that is given as a bare state dict."""
