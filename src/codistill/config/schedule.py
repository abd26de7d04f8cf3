"""The learning-rate schedule, which follows from the options alone."""

from __future__ import annotations

import math

from codistill.config.config import Config


def learning_rate_at(config: Config, epoch: int, step: int = 0, steps: int = 1) -> float:
    """Return the learning rate of a step of an epoch (both counted from 0): warm-up, then steps or half a cosine.

    The cosine begins at the peak, where the warm-up ends, and reaches 0 at the end of the last epoch. Epochs whose
    weights are averaged (`--deploy swa`) have a constant rate.
    """
    peak = config.lr if config.lr_base_batch is None else config.lr * config.batch_size / config.lr_base_batch
    if config.first_averaged_epoch is not None and epoch >= config.first_averaged_epoch:
        return 0.5 * peak if config.swa_lr is None else config.swa_lr
    position = epoch + step / steps
    if position < config.warmup_epochs:
        return peak * (position + 1 / steps) / (config.warmup_epochs + 1 / steps)
    if config.schedule == "cosine":
        done = max(epoch - config.warmup_epochs, 0) / max(config.epochs - config.warmup_epochs, 1)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * 0.1 ** sum(epoch >= m for m in config.milestones or ())
