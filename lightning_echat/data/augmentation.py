"""Augmentation of log-mel frames, as the reference implementation does it: masks, then substitutions.

What to alter is drawn where the data is read, and carried out where the mels are made, in a reading worker or for a
whole batch on an accelerator. So the same seed gives the same frames either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_FILL = 0.0
"""What a mask leaves behind: the reference's choice, and also the value that pads batches of mels."""
_NOTHING, _TIME_MASK, _FREQUENCY_MASK, _SUBSTITUTION = range(4)


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
    """A changed copy of the [F, M] frames of one clip."""
    alterations = draw_alterations(*log_mel.shape, config=config, random=random)
    return alter(log_mel[None], alterations[None])[0]


def draw_alterations(frames: int, bins: int, *, config: AugmentationConfig, random: Random) -> Tensor:
    """[K, 4] int64: kind, begin, end, and for a substitution how far back the frames in its stead are."""
    drawn: list[tuple[int, int, int, int]] = []
    for _ in range(config.time_masks):
        start = random.randrange(frames)
        drawn.append((_TIME_MASK, start, start + random.randint(1, config.time_mask_frames), 0))
    for _ in range(config.frequency_masks):
        start = random.randrange(bins)
        drawn.append((_FREQUENCY_MASK, start, start + random.randint(1, config.frequency_mask_bins), 0))
    for _ in range(config.substitutions):
        start = random.randrange(frames)
        end = min(frames, start + random.randint(1, config.substitution_frames))
        drawn.append((_SUBSTITUTION, start, end, random.randint(0, start)))
    return torch.tensor(drawn, dtype=torch.long).reshape(-1, 4)


def alter(log_mels: Tensor, alterations: Tensor) -> Tensor:
    """A changed copy.

    Args:
        log_mels: [C, F, M].
        alterations: [C, K, 4] from `draw_alterations`, zero rows for nothing.
    """
    kinds, starts, ends, backs = alterations[..., None].unbind(2)  # [C, K, 1] each
    frames = torch.arange(log_mels.shape[1], device=log_mels.device)
    bins = torch.arange(log_mels.shape[2], device=log_mels.device)
    within = (frames >= starts) & (frames < ends)  # [C, K, F]
    in_time = (within & (kinds == _TIME_MASK)).any(1)
    in_frequency = ((bins >= starts) & (bins < ends) & (kinds == _FREQUENCY_MASK)).any(1)
    masked = log_mels.masked_fill(in_time[:, :, None] | in_frequency[:, None, :], _FILL)
    # Always taken from the unsubstituted frames, so that one substitution never copies another; the last one stays.
    source = frames.expand(len(log_mels), -1)
    for k in range(alterations.shape[1]):
        chosen = within[:, k] & (kinds[:, k] == _SUBSTITUTION)
        source = torch.where(chosen, frames - backs[:, k], source)
    return masked.gather(1, source[..., None].expand_as(masked))
