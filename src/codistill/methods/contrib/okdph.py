"""OKDPH: online distillation by parameter hybridization (Zhang et al., CVPR 2023): students averaged in weight space.

K students of one architecture begin with the same weights, and each sees its own augmentation of the images; so does
the hybrid h, whose weights are a mean of theirs:

    theta_h = sum_k r_k theta_k,   r_k = 1/K, or r ~ Dirichlet(1, ..., 1) at every step;   z_h = net(x_h; theta_h)
    m   = sg mean(z_1, ..., z_K, z_h)
    L_k = w CE(z_k, y) + (1 - w) CE(z_h, y) + b T^2 KL(softmax(m / T) || softmax(z_k / T))
    fusion every n steps or epochs, after the optimizer's step:   theta_k <- (1 - g) theta_k + g theta_h

Each student minimizes its own L_k, in which theta_k reaches z_h with the factor r_k: its gradient of the second term
is (1 - w) r_k dCE(z_h)/dtheta_h. The sum of all L_k would count CE(z_h) K times; `loss` counts it once, whose gradient
by theta_k is just that. Running statistics are averaged and fused too, momenta stay.

Where the released code differs (`variant="authors"`): its hybrid is a module of its own, so CE(z_h) has no gradient by
theta_k, and L_k is w CE(z_k) + b KL. It fuses after the step with the mean of the weights *before* it, so that with
g = 1 the step just taken is lost, but for its momentum; here the mean is that of after the step.
In the sources each student has its own kind of augmentation; here each has its own draw of the run's augmentation.
Cost: K + 1 networks, with w = 1 or `variant="authors"` K and a forward without gradient.
Shapes: P peers (K in the paper), B batch, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import torch
from torch import Tensor

from codistill.config import MethodConfig, OKDPHConfig
from codistill.losses import cross_entropy, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.methods.training_step import TrainingStep
from codistill.peers import PeerOutputs, Peers, fuse_members, mix_members


class OKDPH(Method):
    """Students whose weights are mixed and fused; see the module's docstring for the equations.

    Args:
        num_peers: Students K, at least 2.
        options: The fields of `OKDPHConfig`.
        seed: Of the Dirichlet draws.

    >>> outputs = PeerOutputs(torch.zeros(2, 1, 10), [], hybrid_logits_BC=torch.zeros(1, 10))
    >>> OKDPH(num_peers=2)(outputs, torch.tensor([3]))["loss"].item()  # 0.8 + 0.8 + 0.2 cross-entropies
    4.144...
    """

    name = "okdph"
    citation = "Zhang et al.: Generalization Matters: Loss Minima Flattening via Parameter Hybridization. CVPR 2023"
    mixes_weights = True

    shares_P: Tensor

    @takes_options(OKDPHConfig)
    def __init__(self, num_peers: int, options: OKDPHConfig, seed: int = 0) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"views", "hybrid"})
        self.seed, self.draws_shares = seed, options.shares == "dirichlet"
        self.is_authors = options.variant == "authors"
        self.label_weight, self.weight, self.temperature = options.label_weight, options.weight, options.temperature
        self.fusion, self.interval, self.interval_unit = options.fusion, options.interval, options.interval_unit
        self.hybrid_has_gradient = not self.is_authors and self.label_weight < 1
        self.divergence = Divergence(options, self.temperature)
        self.needs_full_batch = self.divergence.needs_full_batch
        self._weights_before: dict[str, Tensor] | None = None
        # Drawn anew before every step, so no checkpoint has to hold them.
        self.register_buffer("shares_P", torch.full((num_peers,), 1.0 / num_peers), persistent=False)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method; its draws depend on the seed of the run."""
        return cls(info.num_peers, seed=info.seed, **dataclasses.asdict(config))

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `hybrid_loss_B1`, the hybrid's cross-entropy, and `targets_BC` are for inspection."""
        self.check(outputs)
        assert outputs.hybrid_logits_BC is not None
        z_PBC, z_BC = outputs.logits_PBC, outputs.hybrid_logits_BC
        log_target_BC = soften(torch.cat((z_PBC, z_BC.unsqueeze(0))).detach().mean(0), self.temperature)
        distill_P = self.divergence(z_PBC, log_target_BC, targets_B)
        ce_P, hybrid_B1 = cross_entropy(z_PBC, targets_B), cross_entropy(z_BC[:, None, None], targets_B[:, None, None])
        terms = combine_terms(
            ce_P, distill_P, weight * self.weight, ce_weight=self.label_weight, hybrid_loss_B1=hybrid_B1
        )
        return terms | {"loss": terms["loss"] + (1.0 - self.label_weight) * hybrid_B1.mean()}

    def hybrid_shares(self) -> Tensor | None:
        """Return r, `P`; None for 1/P each."""
        return self.shares_P if self.draws_shares else None

    @torch.no_grad()
    def before_step(self, peers: Peers, step: TrainingStep) -> None:
        """Draw r; where the authors' variant fuses after this step, keep theta_h."""
        if self.draws_shares:
            self.shares_P.copy_(self._draw_shares(step.number), non_blocking=True)
        if self.is_authors and self._is_due(step):
            self._weights_before = mix_members(peers.local, self.hybrid_shares())

    def after_step(self, peers: Peers, step: TrainingStep) -> None:
        """Fuse the students with the hybrid, if it is time."""
        if not self._is_due(step):
            return
        weights, self._weights_before = self._weights_before, None
        if weights is None:
            weights = mix_members(peers.local, self.hybrid_shares())
        fuse_members(peers.local, self.fusion, weights, step.good)

    def _is_due(self, step: TrainingStep) -> bool:
        """Return whether the students are fused after a step."""
        if self.interval_unit == "steps":
            return (step.number + 1) % self.interval == 0
        return step.ends_epoch and (step.epoch + 1) % self.interval == 0

    def _draw_shares(self, number: int) -> Tensor:
        """Draw r ~ Dirichlet(1, ..., 1) on the CPU, from the seed and the step's number alone."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        draws_P = torch.empty(self.num_peers, dtype=torch.float64).exponential_(generator=generator)
        return draws_P / draws_P.sum()
