"""An own method: every peer learns from the mean of all peers' softened predictions.

    L = sum_i CE(z_i, y) + w T^2 KL(mean_j softmax(z_j / T) || softmax(z_i / T))

Copy this file and change it. From the folder that holds it the command line takes the class by its name:

    codistill train own_method:MeanTarget --data digits --model resnet8 --method.temperature 2
    codistill compare own_method:MeanTarget okddip --data digits --model resnet8 --seeds 3

Shapes: P peers, B batch, C classes.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

import codistill as cd
from codistill.config import ABOVE_0, AT_LEAST_0, MethodConfig
from codistill.losses import cross_entropy, kl_from_log_probs, soften
from codistill.methods import Method, Terms, combine_terms


class MeanTarget(Method):
    """Every peer learns from the mean prediction of all of them."""

    name = "mean_target"

    @dataclass(kw_only=True)
    class Config(MethodConfig):
        """Every peer learns from the mean prediction of all of them."""

        temperature: Annotated[float, ABOVE_0] = 3.0
        """T, which softens the predictions."""
        weight: Annotated[float, AT_LEAST_0] = 1.0
        """w, the weight of the distillation terms."""

    def __init__(self, num_peers: int, temperature: float = 3.0, weight: float = 1.0) -> None:
        super().__init__(num_peers)
        self.temperature, self.weight = temperature, weight

    def forward(self, outputs: cd.PeerOutputs, targets_B: Tensor, weight: float = 1.0) -> Terms:
        """Return the terms of the loss; `weight` is the ramp's value, 1 without a ramp."""
        z_PBC = outputs.logits_PBC
        log_probs_PBC = soften(z_PBC.detach(), self.temperature)
        log_target_BC = log_probs_PBC.logsumexp(0) - math.log(self.num_peers)
        distill_P = kl_from_log_probs(z_PBC, log_target_BC, self.temperature)
        return combine_terms(cross_entropy(z_PBC, targets_B), distill_P, weight * self.weight)


if __name__ == "__main__":
    options = {"peers": 2, "train_per_class": 50, "epochs": 8, "batch_size": 50, "lr": 0.05, "out": "runs/own-method"}
    result = cd.train(cd.Config(MeanTarget.Config(temperature=2.0), "resnet8", "digits", **options))
    print(f"test accuracy of the deployed peer: {result.figures['student']['top1']:.2f} %")
