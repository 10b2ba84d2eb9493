"""The typed hand-offs of the platform, in the order in which data passes through them.

shard -> `DialogueSample` -> `TokenizedDialogue` -> `PackedBatch` -> `EChatOutput` -> losses and metrics,
and, when the model answers, `GeneratedReply`. Every module imports this file and this file imports only torch, so two
parts that exchange data never need to import each other.

Shapes use these letters: R rows of a batch, T ids in a row, C audio clips of a batch, F mel frames, M mel bins,
L label sets, D width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The target that no loss counts: positions without supervision and labels that nobody gave."""

SAMPLE_RATE = 16_000
"""Hz. Every waveform inside the platform has it; readers resample, writers say what they wrote."""

MODEL_TYPE = "echat"
"""`model_type` in the config.json of a model of this project."""


class UserError(Exception):
    """A mistake that the user can mend: the command prints the message, one line, and exits with 2.

    The message says what is wrong, where, and what to do.
    """


class SampleRejected(Exception):
    """A sample that cannot be used as asked. `reason` is a short fixed phrase: skips are counted under it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class Turn:
    """What one side of a dialogue says or writes.

    Attributes:
        role: Who speaks.
        text: The words, empty when unknown.
        audio: [samples] float32 in [-1, 1] at `SAMPLE_RATE`, or None for a written turn.
        log_mel: [F, M] float32, computed from `audio` by the data engine where a template needs it.
        speech_codes: [codes] int64 at 25 Hz, or None where the turn has not been tokenized.
        labels: Label set name -> label, for instance {"emotion": "sad", "age": "old"}; only what is known.
            On an assistant turn "emotion" is the emotion of the reply.
        thinking: On an assistant turn, the natural-language thinking that precedes it (without markers).
            The label form is composed from the labels and is never stored.
        speaker_embedding: [size] float32 of the voice that says it, or None where nobody computed one.
    """

    role: Literal["user", "assistant"]
    text: str = ""
    audio: Tensor | None = None
    log_mel: Tensor | None = None
    speech_codes: Tensor | None = None
    labels: dict[str, str] = field(default_factory=dict)
    thinking: str | None = None
    speaker_embedding: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class DialogueSample:
    """One dialogue as a shard holds it: user and assistant turns in alternation, the user first.

    `key`, `shard` and `source` name it in every later error; `speaker` and `voice_type` say whose voice asks.
    """

    turns: list[Turn]
    key: str
    shard: str = ""
    source: str = ""
    speaker: str = ""
    voice_type: str = ""


@dataclass(slots=True, kw_only=True)
class AudioClip:
    """A clip of input speech and the placeholder ids that it fills: ids[start : start + length].

    Attributes:
        log_mel: [F, M] float32; [F, 0] where frames are made on the accelerator.
        start, length: The placeholder span inside the dialogue's ids.
        labels: [L] int64 class index per label set, IGNORE_INDEX where unknown.
        characters: CTC targets of the transcript, empty where unknown. 0 is the blank and never occurs.
        transcript_ids: [n] int64 text ids of the transcript, empty where unknown.
        waveform: [samples] int16 of 16-bit audio, or int32, the bits of floats; only where mels are left to the device.
        alterations: [K, 4] int64, the augmentation to apply there (see `data.augmentation`).
    """

    log_mel: Tensor
    start: int
    length: int
    labels: Tensor
    characters: Tensor
    transcript_ids: Tensor
    waveform: Tensor | None = None
    alterations: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class DialogueReference:
    """What a metric compares an answer with, and where the dialogue stands in its batch.

    `row`, `start`, `length` are filled by batching; `prompt_length` ids of the dialogue come before the answer.
    `labels` and `transcript` belong to the last user turn, `reply` and `reply_emotion` to the last assistant turn.
    `asked_labels` are the label sets that a labelling task asks for, in the order in which the answer lists them.
    """

    key: str
    task: str
    shard: str = ""
    source: str = ""
    speaker: str = ""
    voice_type: str = ""
    transcript: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    asked_labels: tuple[str, ...] = ()
    reply: str = ""
    reply_emotion: str = ""
    prompt_length: int = 0
    row: int = 0
    start: int = 0
    length: int = 0


@dataclass(slots=True)
class Utterance:
    """[codes] int64, the [samples] float32 that they stand for, and the [size] embedding of the voice, if known."""

    codes: Tensor
    waveform: Tensor
    speaker: Tensor | None = None


@dataclass(slots=True, kw_only=True)
class TokenizedDialogue:
    """One dialogue as ids, with the loss mask decided and the label shift done.

    Attributes:
        input_ids: [T] int64 unified ids (see `tokens.vocabulary`).
        labels: [T] int64. labels[t] is the id to predict after reading input_ids[: t + 1]: already shifted, so no
            later code shifts anything. IGNORE_INDEX where nothing is learned.
        speech_scored: True when targets are scored by the softmax over text and speech codes together, False when
            over text alone.
        clips: Input speech in reading order.
        reference: What metrics need.
        utterance: The last reply as it sounds; only where a stage asks for it.
    """

    input_ids: Tensor
    labels: Tensor
    speech_scored: bool
    clips: list[AudioClip]
    reference: DialogueReference
    utterance: Utterance | None = None

    @property
    def num_supervised(self) -> int:
        """Positions that carry a target."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """Rows of one or several dialogues each. Padding only ever stands at the end of a row.

    Attributes:
        input_ids: [R, T] int64.
        labels: [R, T] int64, already shifted, IGNORE_INDEX where nothing is learned.
        speech_scored: [R, T] bool, the softmax that scores the position (see `TokenizedDialogue`).
        position_ids: [R, T] int64, from 0 again at each dialogue.
        document_ids: [R, T] int64, 1, 2, … for the dialogues of a row and 0 on padding. A dialogue sees itself only.
        log_mels: [C, F, M] float32, zero-padded at the end; [C, F, 0] until `waveforms` have become mels.
        log_mel_lengths: [C] int64, valid frames.
        clip_rows, clip_starts, clip_lengths: [C] int64, the placeholder span that each clip fills.
        clip_labels: [C, L] int64 class index per label set or IGNORE_INDEX.
        clip_characters: [C, characters] int64 CTC targets, zero-padded.
        clip_character_lengths: [C] int64.
        clip_transcript_ids: [C, ids] int64 text ids of the transcripts, zero-padded.
        clip_transcript_lengths: [C] int64.
        references: One per dialogue, in row and then reading order.
        waveforms: [C, S], the clips' samples where mels are made on the accelerator, int16 if all of them are, else the
            bits of floats as int32; None once they are made.
        alterations: [C, K, 4] int64, what augmentation then does to them; None for nothing.
        replies: The last replies as they sound, of those dialogues that have codes and audio; None where no stage asks
            for them, or where there are none.
        health: What the reader counted since its previous batch: "read", "kept", "skipped/<reason>",
            "noticed/<reason>", "drawn/<source>/<task>" and "drawn_ids/<source>/<task>". Sums over batches are totals
            of the run.
        position: Where the training data stands after this batch, which is what a checkpoint keeps
            (`data.stream_state.Position`); None elsewhere.
    """

    input_ids: Tensor
    labels: Tensor
    speech_scored: Tensor
    position_ids: Tensor
    document_ids: Tensor
    log_mels: Tensor
    log_mel_lengths: Tensor
    clip_rows: Tensor
    clip_starts: Tensor
    clip_lengths: Tensor
    clip_labels: Tensor
    clip_characters: Tensor
    clip_character_lengths: Tensor
    clip_transcript_ids: Tensor
    clip_transcript_lengths: Tensor
    references: list[DialogueReference]
    waveforms: Tensor | None = None
    alterations: Tensor | None = None
    replies: VoiceBatch | None = None
    health: dict[str, int] = field(default_factory=dict)
    position: Any = None

    def pin_memory(self) -> PackedBatch:
        """Pin every tensor in place; torch's loader calls this, as it does not walk dataclasses."""
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor | VoiceBatch):
                setattr(self, name, value.pin_memory())
        return self

    @property
    def num_tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.document_ids > 0).sum())

    @property
    def num_supervised(self) -> int:
        """Positions that carry a target."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def audio_seconds(self) -> float:
        """Seconds of input speech (100 mel frames a second)."""
        return float(self.log_mel_lengths.sum()) / 100.0


@dataclass(slots=True, kw_only=True)
class HeardSpeech:
    """The clips of a batch as encoder and adapter hand them on. C' is C, or 1 (a dummy clip) for a batch without audio.

    Attributes:
        encoder_frames: [C', F', E] of the speech encoder.
        encoder_lengths: [C'] int64 valid frames.
        adapter_outputs: [C', n, D], what fills the placeholders.
        adapter_lengths: [C'] int64 valid outputs.
    """

    encoder_frames: Tensor
    encoder_lengths: Tensor
    adapter_outputs: Tensor
    adapter_lengths: Tensor


@dataclass(slots=True, kw_only=True)
class EChatOutput:
    """What one pass of the model yields. It holds no full-vocabulary logits; `losses` computes those in chunks.

    Attributes:
        hidden_states: [R, T, D] after the language model's final norm.
        heard: What auxiliary losses look at.
    """

    hidden_states: Tensor
    heard: HeardSpeech


@dataclass(slots=True, kw_only=True)
class GeneratedReply:
    """An answer of the model to one prompt.

    Attributes:
        reference: The dialogue that was asked.
        text_ids: Text ids in the order written, thinking included, end of text excluded.
        text: Their decoded form.
        speech_codes: [codes] int64, empty for a text answer.
        finished: False when a length limit cut the answer short.
        timings: Seconds by name, for instance {"prefill": 0.02, "total": 0.4}; of the whole batch it was part of.
    """

    reference: DialogueReference
    text_ids: list[int]
    text: str
    speech_codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    finished: bool = True
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class VoiceBatch:
    """Utterances that token-to-speech learns from. B is 0 where a rank has none left in a validation.

    Attributes:
        codes: [B, n] int64, 0 after the end.
        code_lengths: [B] int64.
        waveforms: [B, samples] float32 in [-1, 1] at the rate that was asked for, 0 after the end.
        lengths: [B] int64 samples.
        speakers: [B, size] float32 embeddings of the voices, 0 where one is not known; None where none is.
        health: What the reader counted since its previous batch (see `PackedBatch`).
        position: See `PackedBatch`.
    """

    codes: Tensor
    code_lengths: Tensor
    waveforms: Tensor
    lengths: Tensor
    speakers: Tensor | None = None
    health: dict[str, int] = field(default_factory=dict)
    position: Any = None

    def pin_memory(self) -> VoiceBatch:
        """Pin every tensor in place; torch's loader calls this, as it does not walk dataclasses."""
        for name in ("codes", "code_lengths", "waveforms", "lengths", "speakers"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.pin_memory())
        return self
