"""The options of the methods in `methods/contrib`, one dataclass each; see `codistill.config.methods`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from codistill.config.method_base import DivergenceConfig, MethodConfig, Topology
from codistill.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FROM_0_TO_1
from codistill.utils import InputError

if TYPE_CHECKING:
    from codistill.config.options import Options


@dataclass(kw_only=True)
class CodistillationConfig(DivergenceConfig):
    """Codistillation (Anil et al., ICLR 2018): networks learn from snapshots of each other, taken now and then."""

    name: ClassVar[str] = "codistillation"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2

    interval: Annotated[int, AT_LEAST_1] = 50
    """Steps (or epochs) from one snapshot to the next; 50 steps in Preferred Networks' code."""
    interval_unit: Literal["steps", "epochs"] = "steps"
    """What `interval` counts."""
    partition: Literal["same", "disjoint"] = "same"
    """Training images of the networks: all of them for each, or a part of its own for each, as in the paper."""
    burn_in_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Epochs without distillation at the start; default 0.4 of the run, 28 of 70 in Preferred Networks' study."""
    temperature: Annotated[float, ABOVE_0] = 1.0
    """T, with the gradient scaled by T^2; the paper has none."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms after the burn-in."""

    def burn_in(self, epochs: int = 300) -> float:
        """Return the epochs without distillation in a run of so many epochs."""
        return 0.4 * epochs if self.burn_in_epochs is None else self.burn_in_epochs

    def resolved(self, epochs: int) -> Self:
        """Return a copy with the length of the burn-in filled in."""
        return dataclasses.replace(self, burn_in_epochs=self.burn_in(epochs))

    def check(self, options: Options) -> None:
        """Refuse a burn-in that leaves no epoch to distill."""
        super().check(options)
        if self.burn_in_epochs is not None and self.burn_in_epochs > options.epochs - 1:
            raise InputError(
                f"--method.burn-in-epochs {self.burn_in_epochs:g} leaves none of --epochs {options.epochs} to distill; "
                "shorten it"
            )


@dataclass(kw_only=True)
class SwitOKDConfig(DivergenceConfig):
    """SwitOKD (Qian et al., ECCV 2022): a teacher that is too far ahead of its student waits for it."""

    name: ClassVar[str] = "switokd"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2
    max_peers: ClassVar[int | None] = 3
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)

    students: Literal[1, 2] = 1
    """How many of the networks, the last ones, are students; the first ones are teachers. 2 takes 3 networks."""
    temperature: Annotated[float, ABOVE_0] = 1.0
    """T of the distillation terms; who steps is decided at T = 1."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms."""

    def check(self, options: Options) -> None:
        """Refuse two students of two networks."""
        super().check(options)
        if self.students == 2 and (options.peers or self.default_peers) < 3:
            raise InputError("--method.students 2 leaves no teacher of 2 networks; give --peers 3, or drop it")


@dataclass(kw_only=True)
class MCLConfig(DivergenceConfig):
    """Mutual contrastive learning (Yang et al., AAAI 2022): peers learn from the similarities of a batch's images."""

    name: ClassVar[str] = "mcl"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 1

    tau: Annotated[float, ABOVE_0] = 0.1
    """Temperature of the similarities."""
    temperature: Annotated[float, ABOVE_0] = 3.0
    """T of the soft terms, in addition to tau, and of the logit term."""
    vcl_weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast within a peer."""
    icl_weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast between peers."""
    soft_vcl_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of learning from the similarities within the other peers."""
    soft_icl_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of learning from the similarities of the other peers to this one."""
    embedding_dim: Annotated[int, AT_LEAST_1] = 128
    """Numbers of an embedding, and of the hidden layer of its head."""
    logit_weight: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of the logit term, which the code has as an option (of weight 1): both of two peers, of more the last one
    alone, learn from the mean of all logits; the last of more is then deployed."""

    def check(self, options: Options) -> None:
        """Refuse soft labels, a logit term of one peer, and a divergence that nothing is compared by."""
        super().check(options)
        soft = next((name for name in ("label_smoothing", "mixup", "cutmix") if getattr(options, name)), None)
        if soft is not None:
            raise InputError(
                f"--{soft.replace('_', '-')} makes labels soft, and mcl compares images of one class; drop it"
            )
        if self.logit_weight and options.peers == 1:
            raise InputError("--method.logit-weight: one peer has no other to learn from; give --peers 2, or drop it")
        if not self.logit_weight and (self.divergence != "kl" or self.standardize_logits):
            flag = "divergence" if self.divergence != "kl" else "standardize-logits"
            raise InputError(f"--method.{flag} is about mcl's logit term; add --method.logit-weight 1, or drop it")


@dataclass(kw_only=True)
class DLBConfig(DivergenceConfig):
    """Distillation from the last mini-batch (Shen et al., CVPR 2022): one network learns from its own last outputs."""

    name: ClassVar[str] = "dlb"
    default_peers: ClassVar[int] = 1
    min_peers: ClassVar[int] = 1
    max_peers: ClassVar[int | None] = 1
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)

    temperature: Annotated[float, ABOVE_0] = 3.0
    """T (a guess: the released script has no default)."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation term, alpha (a guess as well)."""


@dataclass(kw_only=True)
class HSSAKDConfig(DivergenceConfig):
    """HSSAKD (Yang et al., IJCAI 2021): exits learn class and rotation, and from the other networks' exits."""

    name: ClassVar[str] = "hssakd"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 1
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)

    exits: Annotated[int, AT_LEAST_0] = 3
    """Exits of each network: copies of its later stages in training. 3 in the source's ResNets; 0 is an ablation."""
    rotations: bool = True
    """Train on each image in four rotations, which exits tell apart; without, they learn the classes alone."""
    temperature: Annotated[float, ABOVE_0] = 3.0
    """T, with the gradient scaled by T^2; 3 in the authors' code."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms; 1 in the authors' code."""

    def num_exits(self) -> int:
        """Return the exits of every network."""
        return self.exits


@dataclass(kw_only=True)
class LMCLConfig(DivergenceConfig):
    """L-MCL (Yang et al., TPAMI 2023): mutual contrastive learning between the exits and heads of networks."""

    name: ClassVar[str] = "l_mcl"
    default_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)

    exits: Annotated[int, AT_LEAST_1] = 2
    """Exits of each network: copies of its later stages in training; 2 in the source."""
    tau: Annotated[float, ABOVE_0] = 0.1
    """Divides similarities; 0.1 in the source."""
    temperature: Annotated[float, ABOVE_0] = 3.0
    """T of all soft terms; 3 in the source."""
    vcl_weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast within a head; 0.1 in the source, like the next one."""
    icl_weight: Annotated[float, AT_LEAST_0] = 0.1
    """Weight of the contrast between heads."""
    soft_vcl_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of learning the similarities within other networks' heads; 1 in the source, like the next one."""
    soft_icl_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of learning the other direction's similarities between heads."""
    embedding_dim: Annotated[int, AT_LEAST_1] = 128
    """Numbers of an embedding; 128 in the source."""
    match: Literal["fixed", "learned"] = "fixed"
    """How much a pair of heads counts for an image: fixed, one half; learned, as in the source, by inner steps."""
    match_dim: Annotated[int, AT_LEAST_1] = 128
    """Numbers on which learned matches compare features; 128 in the source."""
    match_interval: Annotated[int, AT_LEAST_1] = 50
    """Batches from one update of learned matches to the next, from each epoch's first on; 50 in the source."""

    def num_exits(self) -> int:
        """Return the exits of every network."""
        return self.exits

    def check(self, options: Options) -> None:
        """Refuse soft labels: which images are of one class would be open."""
        super().check(options)
        soft = next((name for name in ("label_smoothing", "mixup", "cutmix") if getattr(options, name)), None)
        if soft is not None:
            raise InputError(
                f"--{soft.replace('_', '-')} makes labels soft, and l_mcl reads one hard label each; drop it"
            )
        if self.match == "learned" and options.optimizer != "sgd":
            raise InputError(
                f"--method.match learned takes inner steps of SGD, not {options.optimizer}; give --optimizer sgd, or "
                "--method.match fixed"
            )


@dataclass(kw_only=True)
class FFSDConfig(DivergenceConfig):
    """FFSD (Li et al., TNNLS 2021): students, a fusion of their maps, and a leader that learns from it."""

    name: ClassVar[str] = "ffsd"
    default_peers: ClassVar[int] = 3
    min_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)

    feature_terms: bool = True
    """Compare maps too; without, the students learn from each other, and the leader from the fused classifier alone."""
    leader: bool = True
    """Train a leader, the last network; without (FFL), the students themselves learn from the fused classifier."""
    temperature: Annotated[float, ABOVE_0] = 2.0
    """T, with the gradient scaled by T^2; 2 in the authors' code, 3 in that of FFL."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the distillation terms on logits; 1 in the authors' code."""
    diversity_weight: Annotated[float, AT_LEAST_0] = 1e-5
    """Weight of the students' terms on maps; 1e-5 in the authors' code."""
    fusion_weight: Annotated[float, AT_LEAST_0] = 10.0
    """Weight of the leader's terms on maps; 10 in the authors' code."""
    decoder_weight: Annotated[float, AT_LEAST_0] = 1000.0
    """Weight of the decoders' loss; 1000 in the authors' code. Their Adam all but undoes it."""
    decoder_lr: Annotated[float, ABOVE_0] = 1e-3
    """Learning rate of the decoders' Adam; torch's default in the authors' code."""
    ramp_epochs: Annotated[float | None, AT_LEAST_0] = None
    """Epochs over which the terms on maps (FFL: on logits) grow; default 5 (FFL: 80) of 300, scaled to the run."""

    def check(self, options: Options) -> None:
        """Refuse a leader without two students, and terms on maps without a leader."""
        super().check(options)
        self.check_form(options.peers or self.default_peers)

    def check_form(self, num_peers: int) -> None:
        """Check the leader against the terms on maps and the number of networks.

        Raises:
            InputError: they contradict each other.
        """
        if self.leader and num_peers < 3:
            raise InputError(
                f"--peers is {num_peers}; ffsd needs at least 3: two students and the leader; or give "
                "--method.no-leader --method.no-feature-terms"
            )
        if self.feature_terms and not self.leader:
            raise InputError("--method.no-leader has no terms on maps; add --method.no-feature-terms")

    def default_ramp(self, epochs: int) -> float:
        """Return the default length of the ramp: 5 of 300 epochs (FFL's 80), scaled to the run."""
        return epochs * 5 / 300 if self.leader else super().default_ramp(epochs)

    def num_maps(self) -> int:
        """Return the sizes of maps that the networks give: of the last three stages, or the last alone."""
        return 3 if self.feature_terms else 1


@dataclass(kw_only=True)
class CosubConfig(MethodConfig):
    """Co-training of submodels (Touvron et al., CVPR 2023): two draws of a network's drop path teach each other."""

    name: ClassVar[str] = "cosub"
    default_peers: ClassVar[int] = 2
    min_peers: ClassVar[int] = 2
    max_peers: ClassVar[int | None] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("twins",)

    loss: Literal["bce", "ce"] = "bce"
    """bce: binary cross-entropy of every class, as in the code; ce: softmax cross-entropy, as in the abstract."""
    weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of learning from the other draw, relative to the labels."""
    threshold_labels: bool = False
    """Make every class that a mixed label contains a full label of its own (the code's --bce-loss); with bce only."""
    own_views: bool = False
    """Augment every image separately for each draw, which needs no drop path (not in the source)."""

    def check(self, options: Options) -> None:
        """Refuse thresholds for what is no mixed label."""
        super().check(options)
        if self.threshold_labels and self.loss == "ce":
            raise InputError("--method.threshold-labels makes labels that sum to more than 1; add --method.loss bce")
        if self.threshold_labels and options.label_smoothing:
            raise InputError(
                "--label-smoothing gives every class a part of the label, and --method.threshold-labels makes each of "
                "them 1; drop one of the two"
            )


@dataclass(kw_only=True)
class OKDPHConfig(DivergenceConfig):
    """OKDPH (Zhang et al., CVPR 2023): students that are mixed and fused in weight space."""

    name: ClassVar[str] = "okdph"
    default_peers: ClassVar[int] = 2
    topologies: ClassVar[tuple[Topology, ...]] = ("networks",)
    same_start: ClassVar[bool] = True

    variant: Literal["paper", "authors"] = "paper"
    """paper: the hybrid's loss reaches the students, and fusion is with the mean after the step; authors: it does not,
    and fusion is with the mean before the step."""
    shares: Literal["equal", "dirichlet"] = "equal"
    """The students' shares in the hybrid: equal, or drawn anew at every step."""
    label_weight: Annotated[float, FROM_0_TO_1] = 0.8
    """w, the weight of the students' cross-entropy, 1 - w that of the hybrid's; 0.8 for ResNet-110, 1 for ResNet-32."""
    weight: Annotated[float, AT_LEAST_0] = 0.8
    """b, the weight of the distillation terms; 0.8 for ResNet-110, 0.5 for ResNet-32."""
    temperature: Annotated[float, ABOVE_0] = 4.0
    """T."""
    fusion: Annotated[float, FROM_0_TO_1] = 0.5
    """g, how far the students move to the hybrid in a fusion; 0.5 for ResNet-110, 1 for ResNet-32."""
    interval: Annotated[int, AT_LEAST_1] = 5
    """Steps (or epochs) from one fusion to the next."""
    interval_unit: Literal["steps", "epochs"] = "steps"
    """What `interval` counts."""

    def check(self, options: Options) -> None:
        """Refuse images that are all the same for every student, which would stay copies of one."""
        super().check(options)
        random = (options.augment, options.cutout, options.random_erasing, options.auto_augment != "none")
        if not any(random):
            raise InputError(
                "--no-augment shows all students the same images, and okdph's begin with the same weights, so they "
                "would stay copies; drop it"
            )
