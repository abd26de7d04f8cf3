"""BatchNorm over a batch that several ranks share, on any backend (torch's own takes CUDA tensors only).

Each rank gives its number of values, mean and sum of squared deviations; from these every rank has the whole batch's
mean and variance. The gradient is that of the whole batch too: dx = w / s (dy - mean(dy) - xhat mean(dy xhat)), with
both means over all ranks.
Shapes: B batch, C channels, `...` any further dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from codistill.distributed.process_mesh import ProcessMesh
from codistill.utils.errors import InputError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float, mesh: ProcessMesh
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_C = wide.mean(dims)
        squares_C = (wide - mean_C.view(shape)).square().sum(dims)
        count = wide.new_full((1,), x.numel() / x.shape[1])
        statistics = torch.cat((count, mean_C, squares_C))
        # A rank without samples runs one that belongs to another rank, which must not count.
        counts_D1, means_DC, squares_DC = mesh.gather_statistics(statistics * (not mesh.idle)).split(
            [1, len(mean_C), len(mean_C)], 1
        )
        total = counts_D1.sum()
        mean_C = (counts_D1 * means_DC).sum(0) / total
        squares_C = (squares_DC + counts_D1 * (means_DC - mean_C).square()).sum(0)
        rate_C = (squares_C / total + eps).rsqrt()
        xhat = (wide - mean_C.view(shape)) * rate_C.view(shape)
        ctx.save_for_backward(x, weight_C, mean_C, rate_C, total)
        ctx.mesh, ctx.has_bias = mesh, bias_C is not None
        y = xhat if weight_C is None else xhat * weight_C.view(shape)
        y = y if bias_C is None else y + bias_C.view(shape)
        variance_C = squares_C / (total - 1)
        ctx.mark_non_differentiable(mean_C, variance_C)
        return y.to(x.dtype), mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, rate_C, total = ctx.saved_tensors
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        dy = grad_outputs[0].to(mean_C.dtype)
        xhat = (x.to(mean_C.dtype) - mean_C.view(shape)) * rate_C.view(shape)
        sum_C, product_C = dy.sum(dims), (dy * xhat).sum(dims)
        all_sum_C, all_product_C = ctx.mesh.sum_along_data(torch.stack((sum_C, product_C)), "statistics") / total
        dx = dy
        if not ctx.mesh.idle:
            dx = dy - all_sum_C.view(shape) - xhat * all_product_C.view(shape)
        scale_C = rate_C if weight_C is None else rate_C * weight_C
        return (
            (dx * scale_C.view(shape)).to(x.dtype),
            None if weight_C is None else product_C.to(weight_C.dtype),
            sum_C.to(mean_C.dtype) if ctx.has_bias else None,
            None,
            None,
        )


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics in training are those of all ranks of the axis `data`.

    Args:
        norm: The module that it replaces; parameters and statistics are taken from it.
        mesh: The ranks that share the batch.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, mesh: ProcessMesh) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.mesh = mesh
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batches have 2 dimensions or more, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `B x C x ...`."""
        if not self.training:
            return super().forward(input)
        y, mean_C, variance_C = _Normalize.apply(input, self.weight, self.bias, self.eps, self.mesh)  # pyrefly: ignore
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            part = 1.0 / self.num_batches_tracked.double() if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.add_((mean_C - self.running_mean) * part)
                self.running_var.add_((variance_C - self.running_var) * part)
        return y


def convert_batchnorm(module: nn.Module, mesh: ProcessMesh) -> None:
    """Replace every BatchNorm in `module` by a `SyncBatchNorm`; a module used in several places stays one module.

    Raises:
        InputError: a BatchNorm is of a subclass, which may do more than normalize.
    """
    replaced: dict[int, SyncBatchNorm] = {}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if type(child) not in PLAIN:
                raise InputError(
                    f"--sync-bn cannot replace {type(child).__name__}, which is no plain BatchNorm; drop --sync-bn"
                )
            if id(child) not in replaced:
                replaced[id(child)] = SyncBatchNorm(child, mesh)
            setattr(parent, name, replaced[id(child)])
