"""Learned weights of the pairs of heads in L-MCL: maps M that are chosen by what training with them leads to.

    w_ac[b] = sigmoid(cos(M_a f_a[b], M_c f_c[b])),   M_a linear from D_a to K numbers

At every 50th batch of an epoch, the first included, after the step on it, with theta all that the optimizer trains:

    1. twice: a step of SGD on the contrastive part of the loss alone, whose weights are w(M, f)
    2. a step of SGD on sum_{p,s} CE(z_{p,s}, y)
    3. d/dM of sum_{p,s} CE(z_{p,s}, y) at the theta that is reached, through the steps
    4. a step of SGD with Nesterov's momentum on M; theta, momenta and running statistics are as before

As in the source, the steps on theta begin without momentum, have the run's learning rate, momentum and weight decay but
no Nesterov's momentum, and see w as a function of theta too; M's own step has the same learning rate and weight decay.
The source computes step 3 by a recursion that is exact only without momentum, and takes the targets of soft parts as
constants. Here it is backpropagation through the steps, also through those targets, which depend on the step before. A
batch with inner steps costs five forwards and three backwards, which are differentiated in turn.
Shapes: H heads, B batch, D features, E numbers of an embedding, K numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from codistill.peers import PeerOutputs, Peers, Views

MOMENTUM = 0.9
"""Of M's own steps."""


class MatchMaps(nn.Module):
    """The maps M and their momenta, as buffers: the run's optimizer does not train them.

    Args:
        widths: D of every head.
        match_dim: K.

    >>> maps = MatchMaps([4, 6], match_dim=8)
    >>> maps([torch.zeros(5, 4), torch.zeros(5, 6)]).shape
    torch.Size([2, 2, 5])
    """

    def __init__(self, widths: Sequence[int], match_dim: int) -> None:
        super().__init__()
        for h, width in enumerate(widths):
            linear = nn.Linear(width, match_dim)
            for name, value in (("weight", linear.weight), ("bias", linear.bias)):
                self.register_buffer(f"{name}_{h}", value.detach().clone())
                self.register_buffer(f"{name}_{h}_momentum", torch.zeros_like(value))

    def maps(self) -> dict[str, Tensor]:
        """Return the weights and biases by name, without the momenta."""
        return {name: value for name, value in self.named_buffers() if not name.endswith("_momentum")}

    def forward(self, features: Sequence[Tensor], maps: dict[str, Tensor] | None = None) -> Tensor:
        """Return w of every pair of heads and row, `H x H x B`.

        Args:
            features: `B x D` of every head.
            maps: In place of the module's own.
        """
        maps = self.maps() if maps is None else maps
        mapped = [nn.functional.linear(f, maps[f"weight_{h}"], maps[f"bias_{h}"]) for h, f in enumerate(features)]
        unit_HBK = nn.functional.normalize(torch.stack(mapped), dim=-1)
        return torch.einsum("abk,cbk->acb", unit_HBK, unit_HBK).sigmoid()

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], lr: float, weight_decay: float) -> None:
        """Do a step of SGD with Nesterov's momentum; none where a gradient is not finite.

        Args:
            gradients: By the names of `maps`.
            lr: Learning rate.
            weight_decay: L2 penalty.
        """
        good = torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all()
        for name, gradient in gradients.items():
            value, momentum = self.get_buffer(name), self.get_buffer(f"{name}_momentum")
            gradient = gradient + weight_decay * value
            moved = MOMENTUM * momentum + gradient
            value.copy_(torch.where(good, value - lr * (gradient + MOMENTUM * moved), value))
            momentum.copy_(torch.where(good, moved, momentum))


class InnerModel(nn.Module):
    """Peers and their method as one module, so that a forward can run on other weights than their own."""

    def __init__(self, peers: Peers, method: LearnsMatches) -> None:
        super().__init__()
        self.peers, self.method = peers, method  # pyrefly: ignore

    def forward(self, function: Callable[[PeerOutputs], Any], views: Views) -> Any:
        """Return what `function` returns for the peers' outputs."""
        return function(self.peers(views))


class LearnsMatches(Protocol):
    """What a method whose matches are learned provides."""

    def embed(self, outputs: PeerOutputs) -> Tensor:
        """Return the embeddings of every head, `H x B x E`."""
        ...

    def contrastive_loss(
        self, outputs: PeerOutputs, targets_B: Tensor, maps: dict[str, Tensor], fixed_HBE: Tensor | None
    ) -> Tensor:
        """Return the contrastive part of the loss; `fixed_HBE` makes the targets of its soft parts."""
        ...

    def heads_cross_entropy(self, outputs: PeerOutputs, targets_B: Tensor) -> Tensor:
        """Return the cross-entropy of all heads."""
        ...


def match_gradients(
    method: LearnsMatches,
    matches: MatchMaps,
    peers: Peers,
    views: Views,
    targets_B: Tensor,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    """Return the gradients of the maps M after two inner steps and one of cross-entropy; all else stays as it is.

    Args:
        method: What the maps belong to.
        matches: The maps.
        peers: In training mode.
        views: The batch.
        targets_B: Class numbers.
        optimizer: SGD over peers and method, whose learning rates, momenta's factors and weight decays the steps have.
    """
    model = InnerModel(peers, method)
    maps = {name: value.clone().requires_grad_() for name, value in matches.maps().items()}
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    own = [p for p in model.parameters() if p in groups]
    weights: dict[Tensor, Tensor] = {p: p for p in own}
    momenta: dict[Tensor, Tensor] = {}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}  # running statistics move in a forward
    places = _tensor_places(model)

    def run(function: Callable[[PeerOutputs], Any], given: dict[Tensor, Tensor]) -> Any:
        values = {name: given.get(tensor, buffers.get(tensor, tensor)) for name, tensor in places.items()}
        # Modules that body and exits share are in one place; torch would put back the wrong tensor in a second one.
        return functional_call(model, values, (function, views), tie_weights=False)

    def contrastive_loss(given: dict[Tensor, Tensor]) -> Tensor:
        fixed_HBE = run(method.embed, weights) if momenta else None  # before the first step they depend on no M
        return run(lambda outputs: method.contrastive_loss(outputs, targets_B, maps, fixed_HBE), given)

    def cross_entropy(given: dict[Tensor, Tensor]) -> Tensor:
        return run(lambda outputs: method.heads_cross_entropy(outputs, targets_B), given)

    with torch.enable_grad():
        for loss in (contrastive_loss, contrastive_loss, cross_entropy):
            here = {p: weight.view_as(weight) for p, weight in weights.items()}  # differentiated by; targets are not
            gradients = torch.autograd.grad(
                loss(here), list(here.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            for p, gradient in zip(own, gradients, strict=True):  # those without a gradient decay, as in the source
                group = groups[p]
                gradient = gradient + group["weight_decay"] * weights[p]
                momenta[p] = group["momentum"] * momenta[p] + gradient if p in momenta else gradient
                weights[p] = weights[p] - group["lr"] * momenta[p]
        gradients = torch.autograd.grad(cross_entropy(weights), list(maps.values()))
    return dict(zip(maps, gradients, strict=True))


def _tensor_places(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by every name of each module, where a module counts once."""
    return {
        f"{path}.{name}": tensor
        for path, module in model.named_modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }
