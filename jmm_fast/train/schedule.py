"""Learning rate against time."""

import math


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up, then half a cosine.

    ``lr * epoch / warmup_epochs`` before ``warmup_epochs``; afterwards
    ``min_lr + (lr - min_lr) * (1 + cos(pi * (epoch - warmup_epochs) / (epochs - warmup_epochs))) / 2``.

    Args:
        epoch: time in epochs, with its fraction (``step / steps_per_epoch``): the rate changes at every step.
        lr: highest rate.
        min_lr: rate at ``epochs``.
        warmup_epochs: length of the warm-up; the rate starts at 0.
        epochs: length of the whole run.

    Source: the schedule of MAE, which MAMP and JMM-TGT train with.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return lr
    part = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * part))
