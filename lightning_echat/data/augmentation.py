"""Augmentation of log-mel frames, as the reference implementation does it: masks, then substitutions."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from torch import Tensor

_FILL = 0.0
"""What a mask leaves behind: the reference's choice, and also the value that pads batches of mels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """How much to alter; the defaults are the reference's. A count of 0 turns a kind off.

    Attributes:
        time_masks: Stretches of frames set to 0.
        time_mask_frames: Longest such stretch.
        frequency_masks: Bands of mel bins set to 0.
        frequency_mask_bins: Widest such band.
        substitutions: Stretches of frames replaced by earlier ones of the same utterance.
        substitution_frames: Longest such stretch.
    """

    time_masks: int = 2
    time_mask_frames: int = 50
    frequency_masks: int = 2
    frequency_mask_bins: int = 10
    substitutions: int = 3
    substitution_frames: int = 30


def augment(log_mel: Tensor, *, config: AugmentationConfig, random: Random) -> Tensor:
    """A changed copy of [F, M] frames."""
    return _substitute(_mask(log_mel, config=config, random=random), config=config, random=random)


def _mask(log_mel: Tensor, *, config: AugmentationConfig, random: Random) -> Tensor:
    masked = log_mel.clone()
    frames, bins = log_mel.shape
    for _ in range(config.time_masks):
        start = random.randrange(frames)
        masked[start : start + random.randint(1, config.time_mask_frames)] = _FILL
    for _ in range(config.frequency_masks):
        start = random.randrange(bins)
        masked[:, start : start + random.randint(1, config.frequency_mask_bins)] = _FILL
    return masked


def _substitute(log_mel: Tensor, *, config: AugmentationConfig, random: Random) -> Tensor:
    substituted = log_mel.clone()
    frames = log_mel.shape[0]
    for _ in range(config.substitutions):
        start = random.randrange(frames)
        end = min(frames, start + random.randint(1, config.substitution_frames))
        back = random.randint(0, start)
        # Always taken from the unsubstituted frames, so that one substitution never copies another.
        substituted[start:end] = log_mel[start - back : end - back]
    return substituted
