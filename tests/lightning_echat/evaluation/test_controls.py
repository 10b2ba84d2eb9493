"""What the controls play and give, where it does not need a model."""

from __future__ import annotations

from collections import Counter

import pytest

from lightning_echat.evaluation.controls import partners_of


@pytest.mark.parametrize("labels", [2, 5, 7, 10])
def test_a_shuffled_voice_has_the_same_label_as_often_as_chance_has_it(labels: int) -> None:
    """Item sets go through their labels in turn; a partner at a fixed distance would always share one, or never."""
    same: Counter[bool] = Counter()
    for batch in range(40):
        keys = [f"event-{50 * batch + place:05d}" for place in range(50)]
        partners = partners_of(keys)
        assert sorted(partners) == list(range(50)) and all(place != other for place, other in enumerate(partners))
        same.update(place % labels == other % labels for place, other in enumerate(partners))
    expected = (50 / labels - 1) / 49
    assert same[True] / same.total() == pytest.approx(expected, abs=0.05)


def test_a_batch_that_is_made_again_is_shuffled_the_same() -> None:
    keys = [f"key-{number}" for number in range(9)]
    assert partners_of(keys) == partners_of(keys) != partners_of([*keys[1:], "key-9"])
    assert partners_of(["a", "b"]) == [1, 0]
