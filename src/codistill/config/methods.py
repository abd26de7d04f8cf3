"""The options of every method, one dataclass a method; their attribute docstrings are the command line's help.

`None` means "as the variant says", or "scaled with the run".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from codistill.utils.errors import InputError, suggest


@dataclass(kw_only=True)
class MethodConfig:
    """What all methods share."""

    name: ClassVar[str]
    default_peers: ClassVar[int]
    min_peers: ClassVar[int]
    topologies: ClassVar[tuple[str, ...]] = ("networks", "branches")
    """What the method admits; the first is its default."""

    def default_ramp(self) -> bool:
        """Say whether the variant ramps its distillation weight up."""
        return True

    def needs_holdout(self) -> bool:
        """Say whether a part of the training set is to be held out for the method."""
        return False


@dataclass(kw_only=True)
class IndependentConfig(MethodConfig):
    """Peers trained by cross-entropy alone; one peer is the papers' Baseline, branches are their "Ind"."""

    name: ClassVar[str] = "independent"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 1

    rescale: bool = False
    """Divide the gradient that enters the shared trunk by the number of branches (CL's rescaling)."""


@dataclass(kw_only=True)
class KDConfig(MethodConfig):
    """Classic distillation from a trained teacher (Hinton et al., 2015), as a comparison."""

    name: ClassVar[str] = "kd"
    default_peers: ClassVar[int] = 1
    min_peers: ClassVar[int] = 1

    teacher: str | None = None
    """The teacher: a run folder, an exported .safetensors, or a state dict (.pt, .pth) of --method.teacher-model."""
    teacher_model: str | None = None
    """Network of a teacher that is given as a bare state dict."""
    variant: Literal["paper", "okddip_code"] = "paper"
    """paper: (1 - a) CE + a T^2 KL with a = 0.9, T = 4; okddip_code: CE + a T^2 KL with a = 1, T = 3."""
    temperature: float | None = None
    """T; default the variant's."""
    alpha: float | None = None
    """a; default the variant's."""


@dataclass(kw_only=True)
class DMLConfig(MethodConfig):
    """Deep mutual learning (Zhang et al., CVPR 2018): every network learns from every other one's predictions."""

    name: ClassVar[str] = "dml"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2

    variant: Literal["paper", "authors", "okddip_code"] = "paper"
    """paper: mean over the others, T = 1; authors: sum over them; okddip_code: T = 3, joint, targets not detached."""
    target: Literal["pairwise", "mean"] = "pairwise"
    """Learn from each other peer's prediction, or from the mean of their logits."""
    temperature: float | None = None
    """T, with the gradient scaled by T^2; default the variant's."""
    weight: float = 1.0
    """Weight of the distillation terms."""
    update: Literal["joint", "alternating"] | None = None
    """joint: one step for all; alternating: one network after the other, each on what the others say after their steps,
    as in the paper's algorithm (one more forward for all but the last). Default: the variant's on networks, joint on
    branches."""


@dataclass(kw_only=True)
class CLILRConfig(MethodConfig):
    """Collaborative learning with shared intermediate layers (Song & Chai, NeurIPS 2018)."""

    name: ClassVar[str] = "cl_ilr"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[str, ...]] = ("branches", "networks")

    variant: Literal["paper", "okddip_code"] = "paper"
    """paper: b CE + (1 - b) T^2 soft CE, T = 2, targets detached; okddip_code: CE + KL, T = 3, a ramp, not detached."""
    temperature: float | None = None
    """T; default the variant's."""
    beta: float = 0.5
    """b, the weight of the labels (variant paper)."""
    weight: float = 1.0
    """Weight of the distillation term (variant okddip_code)."""
    ramp_epochs: float | None = None
    """Length of the ramp; default 80/300 of the epochs under okddip_code, none in the paper."""
    rescale: bool = True
    """Back-propagation rescaling: each fork divides the gradient that enters the trunk by its number of children."""

    def default_ramp(self) -> bool:
        """Ramp in OKDDip's code alone."""
        return self.variant == "okddip_code"


@dataclass(kw_only=True)
class ONEConfig(MethodConfig):
    """On-the-fly native ensemble (Lan et al., NeurIPS 2018): a gate on the trunk makes the branches' teacher."""

    name: ClassVar[str] = "one"
    default_peers: ClassVar[int] = 3
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[str, ...]] = ("branches",)

    variant: Literal["paper", "authors", "okddip_code"] = "paper"
    """paper: no ramp; authors: a ramp and 1e-7 on the target; okddip_code: those, and the teacher is not detached."""
    temperature: float = 3.0
    """T."""
    weight: float = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: float | None = None
    """Length of the ramp; default 80/300 of the epochs, none in the paper."""

    def default_ramp(self) -> bool:
        """Ramp in both codes, not in the paper's formula."""
        return self.variant != "paper"


@dataclass(kw_only=True)
class OKDDipConfig(MethodConfig):
    """Online distillation with diverse peers (Chen et al., AAAI 2020): attention among peers, and a leader."""

    name: ClassVar[str] = "okddip"
    default_peers: ClassVar[int] = 4
    min_peers: ClassVar[int] = 3

    variant: Literal["paper", "okddip_code"] = "paper"
    """`paper` mixes softened probabilities, as the equation has it; `okddip_code` mixes logits, as the code does."""
    temperature: float = 3.0
    """Softening temperature T of both levels of distillation."""
    weight: float = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: float | None = None
    """Length of the ramp of that weight; default 80/300 of the epochs."""
    detach: Literal["none", "peers", "all"] = "none"
    """Which targets are constants: none (both sources), the peers' predictions (the attention still learns), or all."""
    mask_self: bool = False
    """Leave a peer's own prediction out of its target (removes the optimum in which every peer attends to itself)."""
    ablation: Literal["none", "random", "entropy", "mean", "symmetric", "no_leader"] = "none"
    """The ablations of the paper's Table 5. `no_leader` is also the ensemble form of its Table 4."""
    entropy_weight: float = 0.1
    """Weight of the entropy term of `--method.ablation entropy` (a guess: the paper gives no value)."""


@dataclass(kw_only=True)
class PCLConfig(MethodConfig):
    """Peer collaborative learning (Wu & Gong, AAAI 2021): an ensemble teacher and the peers' mean teachers."""

    name: ClassVar[str] = "pcl"
    default_peers: ClassVar[int] = 3
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[str, ...]] = ("branches", "networks")

    temperature: float = 3.0
    """T."""
    weight: float = 1.0
    """Weight of the distillation terms once the ramp is over."""
    ramp_epochs: float | None = None
    """Length of the ramp; default 80/300 of the epochs."""
    ema_decay: float = 0.999
    """Most that a mean teacher keeps of itself at a step."""
    own_views: bool = True
    """Augment every image anew for each peer (the paper's multiple views)."""


@dataclass(kw_only=True)
class KDCLConfig(MethodConfig):
    """Online distillation via collaborative learning (Guo et al., CVPR 2020): one teacher made of all the networks."""

    name: ClassVar[str] = "kdcl"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2

    target: Literal["naive", "linear", "minlogit", "general"] = "minlogit"
    """How the teacher is made: the best network, the best mixture, the least logits, or weights from a holdout."""
    temperature: float = 2.0
    """T."""
    weight: float = 1.0
    """Weight of the distillation terms."""
    own_views: bool = True
    """Augment every image anew for each network (the paper's invariant collaborative learning)."""
    granularity: Literal["sample", "batch"] = "sample"
    """Mixture of `linear`: one for each sample, or one for the batch."""
    mix: Literal["probs", "logits"] = "probs"
    """What the weights of `general` mix."""
    holdout_fraction: float = 0.05
    """Part of the training set kept for the weights of `general` (the paper keeps a number a class; a guess)."""

    def needs_holdout(self) -> bool:
        """Hold out where the weights are solved for."""
        return self.target == "general"


METHODS: dict[str, type[MethodConfig]] = {c.name: c for c in MethodConfig.__subclasses__()}


def method_config(name: str) -> MethodConfig:
    """Return the default config of the method called `name`."""
    if name not in METHODS:
        raise InputError(f'unknown method "{name}"{suggest(name, METHODS)}')
    return METHODS[name]()
