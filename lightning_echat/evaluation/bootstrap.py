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

    One score has no spread to resample, so its bounds are NaN: a single item says nothing about the next. A score that
    is no number makes all three NaN.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if values.size == 1:
        return Interval(float(values[0]), math.nan, math.nan)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(_resampled_means(values, seed=seed, resamples=resamples), [tail, 1.0 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def share_above_zero(values: Sequence[float] | np.ndarray, *, seed: int, resamples: int = 2000) -> float:
    """Share of resamples with a mean above 0, those at 0 by half; NaN without two values."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return math.nan
    means = _resampled_means(values, seed=seed, resamples=resamples)
    return float((means > 0).mean() + 0.5 * (means == 0).mean())


def _resampled_means(values: np.ndarray, *, seed: int, resamples: int) -> np.ndarray:
    """[resamples] means of draws with replacement. Time grows with resamples times values, memory with values."""
    random = np.random.default_rng(seed)
    return np.array([values[random.integers(0, values.size, size=values.size)].mean() for _ in range(resamples)])
