"""Replies as they sound, beside their codes: what token-to-speech learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lightning_echat.contracts import SampleRejected, UserError, Utterance, VoiceBatch
from lightning_echat.data.decoding import ParsedDialogue, decode_waveform

_MAX_DIFFERENCE = 2
"""Codes by which audio and codes may differ in length: what `echat data tokenize` allows."""


@dataclass(frozen=True, kw_only=True)
class UtteranceConfig:
    """How one utterance is read.

    Attributes:
        sample_rate: Hz of the waveforms.
        code_rate: Codes a second.
        codebook_size: Codes that are known; None for any.
        max_seconds: Longer utterances are skipped and counted.
        speaker_size: Of the speaker embeddings that are wanted; 0 for none.
    """

    sample_rate: int
    code_rate: float = 25.0
    codebook_size: int | None = None
    max_seconds: float = 20.0
    speaker_size: int = 0

    @property
    def samples_per_code(self) -> Fraction:
        """Exactly."""
        return Fraction(self.sample_rate) / Fraction(self.code_rate)


def read_utterance(parsed: ParsedDialogue, number: int, config: UtteranceConfig) -> Utterance:
    """Turn `number` of a dialogue; its waveform is as long as its codes say.

    Raises:
        SampleRejected: It has no codes or no usable audio.
        UserError: It holds a code that the model does not know, or a speaker embedding of another size.
    """
    turn, audio = parsed.sample.turns[number], parsed.audio[number]
    codes, speaker = turn.speech_codes, turn.speaker_embedding if config.speaker_size else None
    if lacking := what_lacks(parsed, number):
        raise SampleRejected(lacking)
    assert codes is not None and audio is not None
    if config.codebook_size is not None and int(codes.max()) >= config.codebook_size:
        raise UserError(
            f"{parsed.sample.shard} {parsed.sample.key} holds speech code {int(codes.max())}, and the model knows "
            f"{config.codebook_size}; give the codebook_size that the shards were tokenized with"
        )
    if speaker is not None and len(speaker) != config.speaker_size:
        raise UserError(
            f"{parsed.sample.shard} {parsed.sample.key} holds a speaker embedding of {len(speaker)} values, and the "
            f"flow takes {config.speaker_size}; give that as its speaker_size, or 0 to train without"
        )
    waveform = decode_waveform(audio, max_seconds=config.max_seconds, sample_rate=config.sample_rate)
    if abs(len(waveform) / config.samples_per_code - len(codes)) > _MAX_DIFFERENCE:
        raise SampleRejected("codes and audio differ in length", f"{len(codes)} codes, {len(waveform)} samples")
    samples = int(len(codes) * config.samples_per_code)
    return Utterance(codes, functional.pad(waveform[:samples], (0, max(0, samples - len(waveform)))), speaker)


def what_lacks(parsed: ParsedDialogue, number: int) -> str:
    """Why turn `number` cannot be read at all, empty where it holds what it must; nothing is decoded."""
    codes = parsed.sample.turns[number].speech_codes
    if parsed.audio[number] is None:
        return "reply without audio"
    return "" if codes is not None and len(codes) else "reply without codes"


def collate_utterances(utterances: Sequence[Utterance], *, samples: int = 0) -> VoiceBatch:
    """A batch of them, none included, padded to the longest, or to so many samples where none is as long."""
    codes, waveforms = [u.codes for u in utterances], [u.waveform for u in utterances]
    if not utterances:
        codes, waveforms = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
    waveforms[0] = functional.pad(waveforms[0], (0, max(0, samples - len(waveforms[0]))))
    return VoiceBatch(
        codes=pad_sequence(codes, batch_first=True)[: len(utterances)],
        code_lengths=torch.tensor([len(u.codes) for u in utterances], dtype=torch.long),
        waveforms=pad_sequence(waveforms, batch_first=True)[: len(utterances)],
        lengths=torch.tensor([len(u.waveform) for u in utterances], dtype=torch.long),
        speakers=_speakers(utterances),
    )


def _speakers(utterances: Sequence[Utterance]) -> Tensor | None:
    """[B, size], 0 where one is not known; None where none is."""
    unknown = next((u.speaker.new_zeros(u.speaker.shape) for u in utterances if u.speaker is not None), None)
    return None if unknown is None else torch.stack([unknown if u.speaker is None else u.speaker for u in utterances])
