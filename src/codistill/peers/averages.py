"""Averages of the peers' weights that are deployed, and neither train nor teach: EMA, and SWA over the last epochs.

They cost no forward or backward of a training step, so they are baselines that a table of methods needs: what an
average of one network's weights brings is not owed to its peers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from codistill.peers.base import Peers
from codistill.peers.ema import MeanTeacher, copy_where, move_towards
from codistill.peers.modes import train_mode


class MovingAverage(MeanTeacher):
    """An exponential moving average for deployment: phi <- d phi + (1 - d) theta, d = min((g + 1)/(g + 10), decay).

    The bound (g + 1)/(g + 10) at step g = 0, 1, ... makes the average one of about the last tenth of the steps until
    the decay is reached, so that it does not hold the initial weights in a short run (as timm and TensorFlow warm up
    theirs). Running statistics are averaged like weights.

    Args:
        peers: The peers to average; they are copied.
        decay: Upper bound of d.
    """

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Move the average towards the peers after step `step`; see `MeanTeacher.update`."""
        keep = min((step + 1) / (step + 10), self.decay)
        move_towards(members_tensors(self.peers), members_tensors(peers), 1.0 - keep, good)


class TailAverage(MeanTeacher):
    """SWA, stochastic weight averaging: the mean of the weights at the ends of the last epochs (Izmailov et al., 2018).

    Until the first of these epochs ends, it is a copy of the peers as of the end of the epoch before.

    Args:
        peers: The peers to average; they are copied.
        first_epoch: The first epoch whose weights are averaged, counted from 0.
        steps_per_epoch: Steps in every epoch.
    """

    def __init__(self, peers: Peers, first_epoch: int, steps_per_epoch: int) -> None:
        super().__init__(peers, 0.0)
        self.first_epoch, self.steps_per_epoch = first_epoch, steps_per_epoch

    def count(self, epoch: int) -> int:
        """Return the number of weights in the average after an epoch; 1 is a copy."""
        return max(epoch - self.first_epoch + 1, 1)

    @torch.no_grad()
    def update(self, peers: Peers, step: int, good: Tensor | None = None) -> None:
        """Add the peers after step `step`, counted from 0, if it ends an epoch; where `good` is 0, nothing changes."""
        epoch, rest = divmod(step + 1, self.steps_per_epoch)
        if rest:
            return
        averages, current, count = members_tensors(self.peers), members_tensors(peers), self.count(epoch - 1)
        if count == 1:
            copy_where(averages, current, good)
        else:
            move_towards(averages, current, 1.0 / count, good)

    @torch.no_grad()
    def recompute_statistics(self, batches: Iterable[Tensor], frozen: Iterable[nn.Module] = ()) -> None:
        """Compute the BatchNorm statistics of the averaged weights anew: averages of weights have others than averaged.

        Each batch counts alike, as in `torch.optim.swa_utils.update_bn`, which knows no frozen modules.

        Args:
            batches: Views of training images, `V x B x C x H x W`.
            frozen: Modules of the average that keep their statistics, and run as in evaluation.
        """
        own = {*self.peers.modules()}
        kept = own & {module for root in frozen for module in root.modules()}
        norms = [m for m in own - kept if isinstance(m, _BatchNorm)]
        norms = [norm for norm in norms if norm.running_mean is not None]
        if not norms:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.track_running_stats = None, True
        try:
            with train_mode(self.peers):
                for module in kept:
                    module.training = False
                for views_VBCHW in batches:
                    self.peers(views_VBCHW)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum, norm.track_running_stats = momentum, False


def members_tensors(peers: Peers) -> list[Tensor]:
    """Return the members' own parameters and running statistics, also of stacked peers: an average runs in a loop."""
    return [*peers.parameters(), *(b for b in peers.buffers() if b.is_floating_point())]
