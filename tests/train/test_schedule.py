"""The learning rate, against the authors' schedule and by hand."""

import math

import numpy as np
import pytest

from jmm_fast.recipes import released
from jmm_fast.train.schedule import learning_rate


def test_released_schedule(golden):
    arrays = np.load(golden("schedule.npz"))
    config = released()
    ours = [
        learning_rate(
            epoch,
            lr=config.optim.lr,
            min_lr=config.optim.min_lr,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
        )
        for epoch in arrays["epoch"].tolist()
    ]
    np.testing.assert_allclose(ours, arrays["lr"], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.0), (1, 0.5), (2, 1.0), (6, 0.6), (10, 0.2), (12, 0.2), (4, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)))],
)
def test_by_hand(epoch, expected):
    assert learning_rate(epoch, lr=1.0, min_lr=0.2, warmup_epochs=2, epochs=10) == pytest.approx(expected, abs=1e-15)


def test_no_warmup_starts_high_and_all_warmup_ends_high():
    assert learning_rate(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=5) == 1.0
    assert learning_rate(5, lr=1.0, min_lr=0.0, warmup_epochs=5, epochs=5) == 1.0
