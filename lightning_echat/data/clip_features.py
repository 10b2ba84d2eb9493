"""What the speech encoder is given of a clip: log-mel frames made in the reading worker, or what they are made from.

In the second case a batch carries waveforms, and `make_log_mels` turns them into frames once they are on the
accelerator. Both ways give the same frames, the same augmentation included, up to rounding.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_echat.contracts import AudioClip, DialogueSample, PackedBatch, TokenizedDialogue
from lightning_echat.data.augmentation import AugmentationConfig, alter, augment, draw_alterations
from lightning_echat.data.decoding import PCM_SCALE
from lightning_echat.data.log_mel import LogMel, num_frames


class ClipFeatures:
    """Gives the clips of dialogues what the encoder needs.

    Args:
        mel_bins: Of a frame.
        on_device: Leave the mels to `make_log_mels`.
        augmentation: How clips are altered where a generator is given; None for never.
    """

    def __init__(
        self, *, mel_bins: int, on_device: bool = False, augmentation: AugmentationConfig | None = None
    ) -> None:
        self._log_mel = LogMel(mel_bins=mel_bins)
        self._on_device = on_device
        self._augmentation = augmentation

    def with_mels(self, sample: DialogueSample, heard: list[int], *, random: Random | None) -> DialogueSample:
        """The dialogue with the mel of each turn named in `heard`; left to the device, a mel of no bins but as long.

        Where `random` is given the last of them is altered; as in the reference, history is left as it is.
        """
        turns = list(sample.turns)
        for place in heard:
            audio = turns[place].audio
            if audio is None:
                continue
            log_mel = torch.empty(num_frames(audio), 0) if self._on_device else self._log_mel(audio)
            if random and self._augmentation and place == heard[-1] and not self._on_device:
                log_mel = augment(log_mel, config=self._augmentation, random=random)
            turns[place] = replace(turns[place], log_mel=log_mel)
        return replace(sample, turns=turns)

    def complete(
        self, dialogue: TokenizedDialogue, sample: DialogueSample, heard: list[int], *, random: Random | None
    ) -> None:
        """Put what mels are made from into the clips of the dialogue, where the device makes them."""
        if not self._on_device:
            return
        audio = [turn.audio for place in heard if (turn := sample.turns[place]).audio is not None]
        for clip, waveform in zip(dialogue.clips, audio, strict=True):
            assert waveform is not None
            # As whole numbers, since precision bf16-true rounds every float of a batch on its way to the device.
            clip.waveform = waveform if waveform.dtype == torch.int16 else waveform.view(torch.int32)
            if random and self._augmentation and clip is dialogue.clips[-1]:
                clip.alterations = self._draw(clip, random)

    def _draw(self, clip: AudioClip, random: Random) -> Tensor:
        assert self._augmentation is not None
        return draw_alterations(len(clip.log_mel), self._log_mel.mel_bins, config=self._augmentation, random=random)


def as_floats(waveforms: Tensor) -> Tensor:
    """The float32 samples of what an `AudioClip` or a batch carries: 16-bit samples, or the bits of floats."""
    if waveforms.dtype == torch.int16:
        return waveforms.float().mul_(PCM_SCALE)
    return waveforms.view(torch.float32)


def make_log_mels(batch: PackedBatch, log_mel: LogMel) -> PackedBatch:
    """Turn the waveforms of a batch, where it carries any, into mels, in place.

    Args:
        batch: On any device.
        log_mel: On the same one.
    """
    if batch.waveforms is not None:
        frames = batch.log_mels.shape[1]  # batching has rounded it up
        log_mels = log_mel.of_batch(as_floats(batch.waveforms), batch.log_mel_lengths)
        if batch.alterations is not None:
            log_mels = alter(log_mels, batch.alterations)
        batch.log_mels = F.pad(log_mels, (0, 0, 0, frames - log_mels.shape[1]))
        batch.waveforms = batch.alterations = None
    return batch
