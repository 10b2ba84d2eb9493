import math
import tracemalloc

import numpy as np
import pytest

from lightning_echat.evaluation.bootstrap import bootstrap_interval, share_above_zero


def test_the_interval_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(0).normal(50.0, 20.0, size=400)
    mean, low, high = bootstrap_interval(scores, seed=1)
    assert mean == pytest.approx(scores.mean())
    half = 1.96 * scores.std() / 20.0
    assert low == pytest.approx(mean - half, abs=0.3)
    assert high == pytest.approx(mean + half, abs=0.3)


def test_a_lower_level_gives_a_narrower_interval():
    scores = [0.0, 100.0] * 30
    wide, narrow = bootstrap_interval(scores, seed=1), bootstrap_interval(scores, seed=1, level=0.5)
    assert narrow.high - narrow.low < wide.high - wide.low


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    scores = [0.0, 20.0, 100.0, 37.5] * 10
    assert bootstrap_interval(scores, seed=3) == bootstrap_interval(scores, seed=3)
    assert bootstrap_interval(scores, seed=3) != bootstrap_interval(scores, seed=4)


def test_nothing_has_no_mean_and_one_score_has_no_interval():
    assert all(math.isnan(value) for value in bootstrap_interval([], seed=0))
    mean, low, high = bootstrap_interval([40.0], seed=0)
    assert mean == 40.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_share_above_zero_counts_zero_by_half_and_is_unknown_of_one_value():
    assert share_above_zero([1.0, 2.0], seed=0) == 1.0
    assert share_above_zero([0.0, 0.0], seed=0) == 0.5
    assert 0.02 < share_above_zero([-3.0, 1.0, -1.0, 2.0, -2.0], seed=0) < 0.4
    assert math.isnan(share_above_zero([1.0], seed=0))


def test_many_items_need_no_more_memory_than_their_scores():
    """All draws at once would take 32 MB here, and 1.6 GB with 2,000 resamples."""
    scores = np.arange(100_000, dtype=np.float64)
    tracemalloc.start()
    bootstrap_interval(scores, seed=0, resamples=20)
    bootstrap_interval(scores, seed=0, resamples=40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * scores.nbytes
