"""How far a mean score can be trusted: percentile bootstrap over items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean and the bounds of its interval. All three are NaN where there was nothing to average."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray, *, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean of `scores` with the percentile interval over `resamples` draws with replacement.

    One score has no spread to resample, so its bounds are NaN: a single item says nothing about the next.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if values.size == 1:
        return Interval(float(values[0]), math.nan, math.nan)
    draws = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    means = values[draws].mean(axis=1)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))
