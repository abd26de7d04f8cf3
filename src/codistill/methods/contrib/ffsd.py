"""FFSD: feature fusion and self-distillation (Li et al., TNNLS 2021): a leader learns from the students' fused maps.

Members 0 to m - 1 are students, and the last is the leader, which is deployed. F_i are a network's last maps, F_{i,s}
those of its earlier stages, sg stops the gradient. With KLT(s <- t) = T^2 KL(softmax(t / T) || softmax(s / T)), T = 2:

    M, u     = Fuse([sg F_1; ...; sg F_m])                                 maps, and logits of a classifier on them
    student: CE(z_i, y) + 1/(m-1) sum_{j != i} KLT(z_i <- sg z_j)
             and for all but the first, w(e) a [ d_div(F_i, sg F_{i-1}) + SD_i(S(sg F_{i-1})) ]
    fusion:  CE(u, y) + KLT(u <- sg mean_i z_i)
    leader:  CE(z_l, y) + KLT(z_l <- sg u)
             + w(e) b [ d(A(F_l), A(sg M)) + d(A(G(F_l)), A([sg F_1; ...; sg F_m])) + SD_l(sg M) ]
    decoder: w(e) c sum_s [ d(D_s, sg F_s) + d(A(D_s), A(sg F_s)) ],   D = D(sg F) of the network's own last maps
    SD(x)  = sum_s d(A(F_s), A(sg D_s(x))),   D in evaluation mode;   a = 1e-5, b = 10, c = 1000
    w(e)   = exp(-5 (1 - min(e, L)/L)^2),   e = 1, 2, ...,   L = 5 epochs of 300

A, d, d_div and S are in `feature_maps`: attention, a distance of normalized maps, the distance from an attention that
is turned around where it is high, and maps shifted to it. The source steps students, fusion, leader and decoders in
turn, each with an optimizer of its own, on targets of before the steps. As the targets are constants and no two of them
share parameters, one step of all is the same. Decoders are trained by Adam here too, in the method; the fusion has the
weight decay of the run, where the source has 1e-5 beside 1e-4.
`feature_terms=False` leaves out all terms of maps but the fused classifier. `leader=False` without them is FFL (Kim et
al., ICPR 2020), m students on networks of their own, where all learn from the fused classifier, which trains them too:

    M, u     = Fuse([F_1; ...; F_m])
    student: CE(z_i, y) + w(e) KLT(z_i <- sg u)
    fusion:  CE(u, y) + w(e) KLT(u <- sg mean_i z_i)

with T = 3, e = 0, 1, ... and L = 80 of 300.
Cost: m + 1 networks (FFL: m), the fusion, and with feature terms G and a decoder of each network but the first.
Shapes: P peers (m + 1), B batch, C classes or channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from codistill.config import FFSDConfig, MethodConfig
from codistill.losses import cross_entropy, sigmoid_ramp, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.contrib.feature_maps import (
    Decoder,
    Fusion,
    MapShape,
    Mixer,
    attention_distance,
    attention_map,
    distance_with_attention,
    diversity_distance,
    normalized_distance,
    shift_maps,
)
from codistill.methods.divergence import Divergence
from codistill.methods.training_step import TrainingStep
from codistill.peers import PeerOutputs, Peers, eval_mode
from codistill.utils import InputError

BETAS, EPS = (0.9, 0.999), 1e-8
"""Of the decoders' Adam: torch's defaults."""


class FFSD(Method):
    """Students, the fusion of their maps, and a leader; see the module's docstring for the equations.

    Args:
        num_peers: Students and the leader, at least 3; at least 2 without a leader.
        map_shapes: Shapes of every peer's maps (`Peers.map_shapes`), equal for all.
        num_classes: Classes C.
        options: The fields of `FFSDConfig`; the default ramp is 5 epochs, 80 without a leader.

    Raises:
        InputError: the networks' maps differ, or there are not as many as the method compares; or there are too few
            networks, or terms on maps without a leader.

    >>> maps = [[torch.zeros(1, 4, 2, 2)]] * 3
    >>> outputs = PeerOutputs(torch.zeros(3, 1, 10), [], maps=maps)
    >>> method = FFSD(3, [[(4, 2, 2)]] * 3, num_classes=10, feature_terms=False)
    >>> method(outputs, torch.tensor([3]))["loss_P"][:2]  # of the students: log 10
    tensor([2.3026, 2.3026])
    """

    name = "ffsd"
    citation = "Li et al.: Distilling a Powerful Student Model via Online Knowledge Distillation. TNNLS 2022"

    @takes_options(FFSDConfig)
    def __init__(
        self, num_peers: int, map_shapes: Sequence[Sequence[MapShape]], num_classes: int, options: FFSDConfig
    ) -> None:
        super().__init__(num_peers)
        options.check_form(num_peers)
        shapes = [list(own) for own in map_shapes]
        _check_shapes(shapes, num_peers, options.num_maps())
        self.needs = frozenset({"maps"})
        self.leader, num_students = options.leader, num_peers - options.leader
        if self.leader:
            self.deployed, self.group = num_peers - 1, tuple(range(num_students))
        self.temperature, self.weight, self.ramp_epochs = options.temperature, options.weight, options.ramp_length()
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch
        channels = shapes[0][-1][0]
        self.fusion = Fusion([channels] * num_students, channels, num_classes)
        self.feature_terms = options.feature_terms
        if not self.feature_terms:
            return
        self.remembers_batches = True  # the decoders learn in `forward`
        self.diversity_weight, self.fusion_weight = options.diversity_weight, options.fusion_weight
        self.decoder_weight, self.decoder_lr = options.decoder_weight, options.decoder_lr
        self.leader_mixer = Mixer(channels, channels * num_students)
        # Of every member but the first. The run's optimizer leaves them alone, as their Adam is here.
        self.decoders = nn.ModuleList(Decoder(own) for own in shapes[1:]).requires_grad_(False)
        for number, parameter in enumerate(self.decoders.parameters()):
            for part in ("gradient", "mean", "square"):
                self.register_buffer(f"{part}_{number}", torch.zeros_like(parameter), persistent=part != "gradient")
        self.register_buffer("decoder_steps", torch.zeros(()))

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method for the peers' maps."""
        return cls(info.num_peers, info.map_shapes, info.num_classes, **dataclasses.asdict(config))

    def weight_at(self, epoch: float) -> float:
        """Return the ramp's value; the source counts epochs from 1, FFL's from 0."""
        return sigmoid_ramp(epoch + self.leader, self.ramp_epochs)

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `fused_ce_B1`, the cross-entropy of the fused classifier, is for inspection.

        Args:
            outputs: With the maps of all members' last stages.
            targets_B: Labels `B`, or soft labels `B x C`.
            weight: Factor of the terms on maps, of those on logits without a leader, `weight_at(epoch)`.
        """
        self.check(outputs)
        z_PBC, last = outputs.logits_PBC, [maps[-1] for maps in outputs.maps]
        students_BCHW = torch.cat([last[i].detach() if self.leader else last[i] for i in self.group], 1)
        fused_BCHW, u_BC = self.fusion(students_BCHW)
        fused_ce_B1 = cross_entropy(u_BC[:, None, None], targets_B[:, None, None])
        log_mean_BC = soften(z_PBC[: len(self.group)].detach().mean(0), self.temperature)
        logit_weight = self.weight if self.leader else self.weight * weight
        # One element, 1 axis: in a captured step the weight is a float64 tensor, and times it a tensor without axes
        # would become float64.
        from_students_1 = self.divergence(u_BC.unsqueeze(0), log_mean_BC, targets_B)
        fusion_loss = (fused_ce_B1.mean(0) + logit_weight * from_students_1).squeeze(0)
        distill_P = self._learn(z_PBC, u_BC, targets_B)
        terms = combine_terms(cross_entropy(z_PBC, targets_B), distill_P, logit_weight, fused_ce_B1=fused_ce_B1)
        if self.feature_terms:
            # Of the earlier stages' maps, but the first member's: both its own and its decoder's loss read them.
            attention = [[attention_map(x) for x in own[:-1]] for own in outputs.maps[1:]]
            feature_P = self._compare_maps(last, attention, students_BCHW, fused_BCHW.detach())
            terms["loss_P"] = terms["loss_P"] + weight * feature_P
            if torch.is_grad_enabled():
                self._train_decoders(outputs.maps[1:], attention, weight)
        return terms | {"loss": terms["loss_P"].sum() + fusion_loss}

    def _learn(self, z_PBC: Tensor, u_BC: Tensor, targets_B: Tensor) -> Tensor:
        """Return what students learn from each other and the leader from the fused classifier (or all from it), `P`."""
        log_u_BC = soften(u_BC.detach(), self.temperature)
        if not self.leader:
            return self.divergence(z_PBC, log_u_BC, targets_B)
        students_MBC = z_PBC[:-1]
        from_others_M = self.divergence.pairwise(students_MBC, students_MBC.detach(), targets_B)
        leader = self.divergence(z_PBC[-1], log_u_BC, targets_B)
        return torch.cat((from_others_M / (len(students_MBC) - 1), leader.reshape(1)))

    def _compare_maps(
        self, last: list[Tensor], attention: list[list[Tensor]], students_BCHW: Tensor, fused_BCHW: Tensor
    ) -> Tensor:
        """Return the terms on maps of all members, `P`; the first has none.

        Args:
            last: The last maps of all members.
            attention: That of the earlier maps of all members but the first.
            students_BCHW: The students' last maps side by side, constant.
            fused_BCHW: M, constant.
        """
        terms = [fused_BCHW.new_zeros(())]
        for i in range(1, len(last) - 1):
            before_BCHW = last[i - 1].detach()
            diversity = diversity_distance(last[i], before_BCHW)
            decoded = self._decode(i - 1, attention[i - 1], shift_maps(before_BCHW))
            terms.append(self.diversity_weight * (diversity + decoded))
        distance = attention_distance(last[-1], fused_BCHW)
        distance = distance + attention_distance(self.leader_mixer(last[-1]), students_BCHW)
        terms.append(self.fusion_weight * (distance + self._decode(-1, attention[-1], fused_BCHW)))
        return torch.stack(terms)

    def _decode(self, number: int, attention: list[Tensor], x_BCHW: Tensor) -> Tensor:
        """Return SD(x): the distance of a member's earlier maps from what its decoder, of this number, makes of x."""
        decoder = self.decoders[number]
        with torch.no_grad(), eval_mode(decoder):
            targets = [attention_map(made) for made in decoder(x_BCHW)]
        pairs = zip(reversed(attention), targets, strict=True)
        return torch.stack([normalized_distance(own, target) for own, target in pairs]).sum()

    def _train_decoders(self, maps: list[list[Tensor]], attention: list[list[Tensor]], weight: float) -> None:
        """Compute the gradients of the decoders' losses, for the step of their Adam after that of the run."""
        parameters = list(self.decoders.parameters())
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        by_parameter = dict(zip(map(id, parameters), leaves))
        losses = []
        for decoder, own, own_attention in zip(self.decoders, maps, attention, strict=True):
            named = {name: by_parameter[id(parameter)] for name, parameter in decoder.named_parameters()}
            decoded = functional_call(decoder, named, (own[-1].detach(),))
            for made, target, its_attention in zip(decoded, reversed(own[:-1]), reversed(own_attention), strict=True):
                constants = target.detach(), its_attention.detach()
                losses.append(distance_with_attention(made, constants[0], attention_map(made), constants[1]))
        gradients = torch.autograd.grad(weight * self.decoder_weight * torch.stack(losses).sum(), leaves)
        for number, gradient in enumerate(gradients):
            self.get_buffer(f"gradient_{number}").copy_(gradient)

    @torch.no_grad()
    def after_step(self, peers: Peers, step: TrainingStep) -> None:
        """Let the decoders' Adam step on the gradients of the batch; not where the step is refused."""
        if not self.feature_terms:
            return
        good = torch.ones_like(self.decoder_steps) if step.good is None else step.good.to(self.decoder_steps.dtype)
        self.decoder_steps += good
        corrections = [1 - beta ** self.decoder_steps.clamp_min(1) for beta in BETAS]
        for number, parameter in enumerate(self.decoders.parameters()):
            gradient, mean, square = (self.get_buffer(f"{part}_{number}") for part in ("gradient", "mean", "square"))
            new_mean = mean.lerp(gradient, 1 - BETAS[0])
            new_square = square.lerp(gradient.square(), 1 - BETAS[1])
            change = new_mean / corrections[0] / ((new_square / corrections[1]).sqrt() + EPS)
            for x, new in ((mean, new_mean), (square, new_square), (parameter, parameter - self.decoder_lr * change)):
                x.copy_(torch.where(good > 0, new, x))


def _check_shapes(shapes: list[list[MapShape]], num_peers: int, count: int) -> None:
    """Check the shapes of the networks' maps.

    Raises:
        InputError: see `FFSD`.
    """
    if len(shapes) != num_peers or any(len(own) != count for own in shapes):
        raise InputError(
            f"ffsd reads {count} maps of each of {num_peers} networks as it is configured here; build the peers with "
            f"maps={count}"
        )
    if any(own != shapes[0] for own in shapes):
        raise InputError(
            f"--model: ffsd compares the maps of its networks, and these have {shapes[0][-1]} and "
            f"{next(own for own in shapes if own != shapes[0])[-1]}; take networks whose maps have one shape"
        )
    for (_, *large), (_, *small) in pairwise(shapes[0]):
        if any(a not in (2 * b, 2 * b - 1) for a, b in zip(large, small)):
            raise InputError(
                f"--model: ffsd decodes maps to the size of the stage before, twice as large, and these go from "
                f"{large[0]} x {large[1]} to {small[0]} x {small[1]}; take another network, or "
                "--method.no-feature-terms"
            )
