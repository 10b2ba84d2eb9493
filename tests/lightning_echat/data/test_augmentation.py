from random import Random

import pytest
import torch

from lightning_echat.data.augmentation import AugmentationConfig, augment

NOTHING = {"time_masks": 0, "frequency_masks": 0, "substitutions": 0}


def frames(count: int = 300) -> torch.Tensor:
    """Every frame has a value of its own, none of them 0."""
    return (torch.arange(count, dtype=torch.float32) + 1)[:, None].expand(count, 80).clone()


def changed(**counts) -> torch.Tensor:
    return augment(frames(), config=AugmentationConfig(**{**NOTHING, **counts}), random=Random(1))


def test_nothing_asked_changes_nothing():
    assert torch.equal(changed(), frames())


def test_the_defaults_are_the_references():
    assert AugmentationConfig() == AugmentationConfig(
        time_masks=2,
        time_mask_frames=50,
        frequency_masks=2,
        frequency_mask_bins=10,
        substitutions=3,
        substitution_frames=30,
    )


def test_a_time_mask_zeroes_whole_neighbouring_frames():
    masked = (changed(time_masks=1) == 0).all(dim=1)
    assert 1 <= int(masked.sum()) <= 50
    assert torch.equal((changed(time_masks=1) == 0).any(dim=1), masked)
    places = masked.nonzero().flatten()
    assert int(places[-1] - places[0]) + 1 == len(places)


def test_a_frequency_mask_zeroes_whole_bands():
    masked = (changed(frequency_masks=1) == 0).all(dim=0)
    assert 1 <= int(masked.sum()) <= 10


def test_a_substitution_repeats_earlier_frames_of_the_same_utterance():
    got = changed(substitutions=3)[:, 0]
    differs = got != frames()[:, 0]
    assert 1 <= int(differs.sum()) <= 90
    assert (got <= frames()[:, 0]).all()
    assert set(got.tolist()) <= set(frames()[:, 0].tolist())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_short_clips_survive(count):
    for seed in range(50):
        assert augment(frames(count), config=AugmentationConfig(), random=Random(seed)).shape == (count, 80)


def test_the_original_is_left_alone_and_the_generator_decides():
    original = frames()
    first = augment(original, config=AugmentationConfig(), random=Random(3))
    assert torch.equal(original, frames())
    assert torch.equal(first, augment(original, config=AugmentationConfig(), random=Random(3)))
    assert not torch.equal(first, augment(original, config=AugmentationConfig(), random=Random(4)))
