"""The options of every method, one dataclass each; their attribute docstrings are the help of the command line.

A default of None depends on the variant or on the length of the run; the docstring says how.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from codistill.config.contrib import (
    CodistillationConfig,
    CosubConfig,
    DLBConfig,
    FFSDConfig,
    HSSAKDConfig,
    LMCLConfig,
    MCLConfig,
    OKDPHConfig,
    SwitOKDConfig,
)
from codistill.config.method_base import DivergenceConfig, MethodConfig, TeacherConfig, Topology
from codistill.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    BETWEEN_0_AND_1,
    FINITE,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
)
from codistill.utils import InputError, import_object, suggest

if TYPE_CHECKING:
    from codistill.config.options import Options


@dataclass(kw_only=True)
class IndependentConfig(MethodConfig):
    """Peers trained by cross-entropy alone; one peer is the papers' Baseline, branches are their "Ind"."""

    name: ClassVar[str] = "independent"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 1

    rescale: bool = False
    """Divide the gradient that enters the shared trunk by the number of branches (CL's rescaling)."""


@dataclass(kw_only=True)
class KDConfig(TeacherConfig, DivergenceConfig):
    """Classic distillation from a trained teacher (Hinton et al., 2015), as a comparison."""

    name: ClassVar[str] = "kd"
    default_peers: ClassVar[int] = 1
    min_peers: ClassVar[int] = 1

    variant: Literal["paper", "okddip_code"] = "paper"
    """paper: (1 - a) CE + a T^2 KL with a = 0.9, T = 4; okddip_code: CE + a T^2 KL with a = 1, T = 3."""
    temperature: Annotated[float | None, ABOVE_0] = None
    """T; default the variant's."""
    alpha: Annotated[float | None, FROM_0_TO_1] = None
    """a; default the variant's."""


@dataclass(kw_only=True)
class DMLConfig(DivergenceConfig):
    """Deep mutual learning (Zhang et al., CVPR 2018): every network learns from every other one's predictions."""

    name: ClassVar[str] = "dml"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2

    variant: Literal["paper", "authors", "okddip_code"] = "paper"
    """paper: mean over the others, T = 1; authors: sum over them; okddip_code: T = 3, joint, targets not detached."""
    target: Literal["pairwise", "mean"] = "pairwise"
    """Learn from each other peer's prediction, or from the mean of their logits."""
    temperature: Annotated[float | None, ABOVE_0] = None
    """T, with the gradient scaled by T^2; default the variant's."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms."""
    update: Literal["joint", "alternating"] | None = None
    """joint: one step for all networks; alternating: one network after the other, each on the predictions of the others
    after their steps, as in the paper's algorithm (one more forward for all but the last). Default: the variant's on
    networks, joint on branches."""

    def check(self, options: Options) -> None:
        """Refuse alternating updates of branches."""
        super().check(options)
        if options.topology == "branches" and self.update == "alternating":
            raise InputError("--method.update alternating steps one network at a time; branches share a trunk, drop it")


@dataclass(kw_only=True)
class CLILRConfig(DivergenceConfig):
    """Collaborative learning with shared intermediate layers (Song & Chai, NeurIPS 2018)."""

    name: ClassVar[str] = "cl_ilr"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("branches", "networks")

    variant: Literal["paper", "okddip_code"] = "paper"
    """paper: b CE + (1 - b) T^2 soft CE, T = 2, targets detached; okddip_code: CE + KL, T = 3, a ramp, not detached."""
    temperature: Annotated[float | None, ABOVE_0] = None
    """T; default the variant's."""
    beta: Annotated[float, FROM_0_TO_1] = 0.5
    """b, the weight of the labels (variant paper)."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation term (variant okddip_code)."""
    ramp_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Length of the ramp; default 80/300 of the epochs under okddip_code, none in the paper."""
    temperature_squared: bool = True
    """Multiply the soft term by T^2 (variant paper). Doubtful: a public implementation of the paper does not, which at
    T = 2 is a quarter of the term."""
    rescale: bool = True
    """Back-propagation rescaling: each fork divides the gradient that enters the trunk by its number of children."""

    def check(self, options: Options) -> None:
        """Refuse a soft term without T^2 in the variant of a code that has it."""
        super().check(options)
        if self.variant == "okddip_code" and not self.temperature_squared:
            raise InputError(
                "--method.no-temperature-squared is for the paper's form; drop it, or drop --method.variant okddip_code"
            )

    def default_ramp(self, epochs: int) -> float:
        """Return the length for `okddip_code`; the paper has no ramp."""
        return super().default_ramp(epochs) if self.variant == "okddip_code" else 0.0


@dataclass(kw_only=True)
class ONEConfig(DivergenceConfig):
    """On-the-fly native ensemble (Lan et al., NeurIPS 2018): a gate on the trunk makes the branches' teacher."""

    name: ClassVar[str] = "one"
    default_peers: ClassVar[int] = 3
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("branches",)

    variant: Literal["paper", "authors", "okddip_code"] = "paper"
    """paper: no ramp; authors: a ramp and 1e-7 on the target; okddip_code: those, and the teacher is not detached."""
    temperature: Annotated[float, ABOVE_0] = 3.0
    """T."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Length of the ramp; default 80/300 of the epochs, none in the paper."""

    def default_ramp(self, epochs: int) -> float:
        """Return the length for both codes; the paper's formula has no ramp."""
        return 0.0 if self.variant == "paper" else super().default_ramp(epochs)


@dataclass(kw_only=True)
class OKDDipConfig(DivergenceConfig):
    """Online distillation with diverse peers (Chen et al., AAAI 2020): attention among peers, and a leader."""

    name: ClassVar[str] = "okddip"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 3
    min_peers_note: ClassVar[str] = " (auxiliary peers and the leader)"

    variant: Literal["paper", "okddip_code"] = "paper"
    """paper: mix softened probabilities, as in the equation; okddip_code: mix logits, as in the code."""
    temperature: Annotated[float, ABOVE_0] = 3.0
    """Softening temperature T of both levels of distillation."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Length of the ramp of that weight; default 80/300 of the epochs."""
    detach: Literal["none", "peers", "all"] = "none"
    """Which targets are detached: none (as in both sources), peers (their predictions; the attention still learns), or
    all."""
    mask_self: bool = False
    """Exclude a peer's own prediction from its target (removes the optimum in which every peer attends to itself)."""
    ablation: Literal["none", "random", "entropy", "mean", "symmetric", "no_leader"] = "none"
    """The ablations of the paper's Table 5. `no_leader` with `--deploy ensemble` is near the form of its Table 4, whose
    ensemble averages logits in the code."""
    entropy_weight: Annotated[float, FINITE] = 0.1
    """Weight of the entropy term of `--method.ablation entropy` (a guess: the paper gives no value)."""


@dataclass(kw_only=True)
class PCLConfig(DivergenceConfig):
    """Peer collaborative learning (Wu & Gong, AAAI 2021): an ensemble teacher and the peers' mean teachers."""

    name: ClassVar[str] = "pcl"
    keeps_ema: ClassVar[bool] = True
    default_peers: ClassVar[int] = 3
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("branches", "networks")

    temperature: Annotated[float, ABOVE_0] = 3.0
    """T."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Length of the ramp; default 80/300 of the epochs."""
    ema_decay: Annotated[float, FROM_0_BELOW_1] = 0.999
    """Largest decay of the moving average: the part of a mean teacher that stays per step."""
    own_views: bool = True
    """Augment every image separately for each peer (the paper's multiple views)."""


@dataclass(kw_only=True)
class KDCLConfig(DivergenceConfig):
    """Online distillation via collaborative learning (Guo et al., CVPR 2020): one teacher made of all the networks."""

    name: ClassVar[str] = "kdcl"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2

    target: Literal["naive", "linear", "minlogit", "general"] = "minlogit"
    """How the teacher is made: naive, the best network; linear, the best mixture; minlogit, the least logits; general,
    a mixture with weights from a holdout."""
    temperature: Annotated[float, ABOVE_0] = 2.0
    """T."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms."""
    own_views: bool = True
    """Augment every image separately for each network (the paper's invariant collaborative learning)."""
    granularity: Literal["sample", "batch"] = "sample"
    """Whether `linear` solves for one mixture per sample, or one per batch."""
    mix: Literal["probs", "logits"] = "probs"
    """What the weights of `general` mix."""
    holdout_fraction: Annotated[float, BETWEEN_0_AND_1] = 0.05
    """Fraction of the training set held out for the weights of `general` (a guess: our sources do not state the
    paper's)."""

    def needs_holdout(self) -> bool:
        """Return whether the weights of `general` are solved for."""
        return self.target == "general"

    def check(self, options: Options) -> None:
        """Refuse soft labels for the targets that read one hard label per image."""
        super().check(options)
        soft = next((name for name in ("label_smoothing", "mixup", "cutmix") if getattr(options, name)), None)
        if soft is not None and self.target != "general":
            raise InputError(
                f"--{soft.replace('_', '-')} makes labels soft, and kdcl's {self.target} target reads one hard label "
                "each; drop it, or give --method.target general"
            )


METHODS: dict[str, type[MethodConfig]] = {
    method.name: method
    for method in (
        IndependentConfig,
        KDConfig,
        DMLConfig,
        CLILRConfig,
        ONEConfig,
        OKDDipConfig,
        PCLConfig,
        KDCLConfig,
        CodistillationConfig,
        SwitOKDConfig,
        MCLConfig,
        DLBConfig,
        HSSAKDConfig,
        LMCLConfig,
        CosubConfig,
        OKDPHConfig,
        FFSDConfig,
    )
}
"""Every method's config, by its name."""


@dataclass(kw_only=True)
class UnimportedConfig(MethodConfig):
    """The options of an own method whose code is not imported, for a report, which only shows them."""

    name: str  # type: ignore[misc]
    options: dict[str, Any]


def method_config(name: str) -> MethodConfig:
    """Return the default config of a method: a built-in name, or package.module:Class, which is imported.

    Raises:
        InputError: there is no such method, or the class is not complete.
    """
    module, colon, class_name = name.partition(":")
    if colon:
        own = import_object(module, class_name, f"method {name}")
        if not hasattr(own, "config_class"):
            raise InputError(f"method {name} is no method; derive the class from codistill.methods.Method")
        config: type[MethodConfig] = own.config_class()
        try:
            return config()
        except TypeError as error:
            raise InputError(f"method {name}: give every option of its Config a default ({error})") from None
    if name not in METHODS:
        raise InputError(f'unknown method "{name}"{suggest(name, METHODS)}')
    return METHODS[name]()


def restore_config(import_name: str, options: dict[str, Any]) -> MethodConfig:
    """Return the options of an own method, whose module is imported."""
    return dataclasses.replace(method_config(import_name), **options)
