"""The same training in one process: BatchNorm over the chunks that ranks would have, everything else over the batch."""

import torch
import torch.nn.functional as F
from torch import nn

from codistill.training.build import build_run
from codistill.utils import share_out
from helpers.mesh_worker import STEPS, config, finish, run_steps, teacher


class ChunkNorm(nn.BatchNorm2d):
    """Normalises each of `chunks` parts of a batch as a rank would; its own statistics are the mean of theirs."""

    chunks = 1
    rows_per_image = 1

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if self.num_batches_tracked % 4 == 0:  # ranks take their mean at the end of an epoch
            self.kept = [(self.running_mean.clone(), self.running_var.clone()) for _ in range(self.chunks)]
        parts = []
        sizes = [self.rows_per_image * count for count in share_out(len(x) // self.rows_per_image, self.chunks)]
        for part, (mean, var) in zip(x.split(sizes), self.kept):
            if not self.track_running_stats:
                mean = var = None
            if len(part):
                parts.append(F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps))
        if self.track_running_stats:
            self.running_mean.copy_(torch.stack([mean for mean, _ in self.kept]).mean(0))
            self.running_var.copy_(torch.stack([var for _, var in self.kept]).mean(0))
            self.num_batches_tracked += 1
        return torch.cat(parts)


def one_process(case: str, chunks: int, peers: int):
    """Train `case` in this process."""
    t = build_run(config(case, peers=peers), teacher(case))
    for module in (t.peers, t.ema):
        for norm in module.modules() if module is not None else ():
            if isinstance(norm, nn.BatchNorm2d):
                norm.__class__, norm.chunks = ChunkNorm, chunks
                norm.rows_per_image = t.method.rows_per_image
    return finish(t, run_steps(t, STEPS))


def largest_difference(ours: dict, theirs: dict, recorded: bool = True) -> float:
    """Compare two states: weights, statistics (if `recorded`), averages, the method's own, momenta, sums."""
    assert [ours[k] for k in ("epoch", "step", "best")] == [theirs[k] for k in ("epoch", "step", "best")]
    worst = 0.0
    for part in ("peers", "method", "ema", "average", "sums"):
        assert (ours.get(part) is None) == (theirs.get(part) is None)
        if ours.get(part) is not None:
            assert ours[part].keys() == theirs[part].keys()
            for key, value in ours[part].items():
                if not recorded and key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    continue
                worst = max(worst, gap(value, theirs[part][key]))
    for one, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        assert one["state"].keys() == other["state"].keys()
        for index, entry in one["state"].items():
            worst = max(worst, gap(entry["momentum_buffer"], other["state"][index]["momentum_buffer"]))
    return worst


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative where numbers are above 1."""
    scale = other.double().abs().clamp_min(1.0)
    return ((one.double() - other.double()).abs() / scale).max().item() if one.numel() else 0.0
