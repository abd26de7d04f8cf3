"""ONE: on-the-fly native ensemble (Lan, Zhu, Gong, NeurIPS 2018): a gate on the trunk weighs the branches' logits.

    g   = softmax(ReLU(BatchNorm(W_g avgpool(trunk) + b_g)))            per sample, in R^P
    z_t = sum_i g_i z_i
    L   = sum_i CE(z_i, y) + CE(z_t, y) + w(e) sum_i T^2 KL(softmax(z_t / T) || softmax(z_i / T))

The teacher z_t is a constant in the last term: the gate learns from CE(z_t, y) alone. The paper's formula has no ramp;
the authors' scripts have one, and their code adds 1e-7 to the target (`variant="authors"`). OKDDip's code does that
too, and detaches nothing (`variant="okddip_code"`).
Shapes: P branches, B batch, C classes, D channels of the trunk.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from codistill.config import MethodConfig, ONEConfig
from codistill.losses import SOURCE_EPS, cross_entropy, soften
from codistill.methods.base import Method, PeerInfo, Terms, combine_terms, takes_options
from codistill.methods.divergence import Divergence
from codistill.peers import PeerOutputs
from codistill.utils import InputError


class ONE(Method):
    """A gated ensemble teaches its branches; see the module's docstring for the equations.

    Args:
        num_peers: Branches.
        trunk_dim: Channels D of the trunk where it forks.
        options: The fields of `ONEConfig`; the default ramp is 80 epochs, none for the paper.

    >>> from codistill.peers import PeerOutputs
    >>> outputs = PeerOutputs(torch.zeros(3, 8, 10), [], trunk_BD=torch.zeros(8, 16))
    >>> ONE(num_peers=3, trunk_dim=16)(outputs, torch.arange(8))["gate_BP"][0]
    tensor([0.3333, 0.3333, 0.3333])
    """

    name = "one"
    citation = "Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble. NeurIPS 2018"
    needs_full_batch = True  # the gate normalizes over the batch

    @takes_options(ONEConfig)
    def __init__(self, num_peers: int, trunk_dim: int, options: ONEConfig) -> None:
        super().__init__(num_peers)
        self.needs = frozenset({"trunk"})
        self.temperature, self.weight = options.temperature, options.weight
        self.ramp_epochs = options.ramp_length()
        self.detach = options.variant != "okddip_code"
        eps = 0.0 if options.variant == "paper" else SOURCE_EPS
        self.divergence = Divergence(options, self.temperature, eps)
        self.gate = nn.Linear(trunk_dim, num_peers)
        self.gate_norm = nn.BatchNorm1d(num_peers)

    @classmethod
    def build(cls, config: MethodConfig, info: PeerInfo) -> Self:
        """Build the method for branches; networks have no trunk for the gate to read.

        Raises:
            InputError: the peers have no trunk.
        """
        if info.trunk_dim is None:
            raise InputError("one needs the shared trunk's output; use --topology branches")
        return cls(info.num_peers, info.trunk_dim, **dataclasses.asdict(config))

    def gate_logits(self, trunk_BD: Tensor) -> Tensor:
        """Return ReLU(BatchNorm(W_g t + b_g)), `B x P`; a single sample is normalized by the running statistics."""
        scores_BP, norm = self.gate(trunk_BD), self.gate_norm
        if self.training and len(scores_BP) == 1:
            scores_BP = F.batch_norm(
                scores_BP, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
            )
        else:
            scores_BP = norm(scores_BP)
        return scores_BP.relu()

    def forward(self, outputs: PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms; `gate_BP`, `ce_teacher` and `targets_PBC` are for inspection."""
        self.check(outputs)
        assert outputs.trunk_BD is not None
        return self.distil(outputs.logits_PBC, self.gate_logits(outputs.trunk_BD), targets_B, weight)

    def distil(self, z_PBC: Tensor, gate_logits_BP: Tensor, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms for given gate logits."""
        gate_BP = gate_logits_BP.softmax(-1)
        teacher_BC = gated_mean(gate_BP, z_PBC)
        ce_teacher = cross_entropy(teacher_BC, targets_B)
        log_target_BC = soften(teacher_BC.detach() if self.detach else teacher_BC, self.temperature)
        distill_P = self.divergence(z_PBC, log_target_BC, targets_B)
        terms = combine_terms(cross_entropy(z_PBC, targets_B), distill_P, weight * self.weight, gate_BP=gate_BP)
        terms["loss"] = terms["loss"] + ce_teacher
        return terms | {"ce_teacher": ce_teacher.detach(), "targets_PBC": log_target_BC.detach().expand_as(z_PBC)}

    def ensemble(self, outputs: PeerOutputs) -> Tensor:
        """Return the gated teacher's log-probabilities."""
        assert outputs.trunk_BD is not None
        return gated_mean(self.gate_logits(outputs.trunk_BD).softmax(-1), outputs.logits_PBC).log_softmax(-1)


def gated_mean(gate_BP: Tensor, z_PBC: Tensor) -> Tensor:
    """Return sum_i g_i z_i, `B x C`."""
    return (gate_BP.t().unsqueeze(-1) * z_PBC).sum(0)
