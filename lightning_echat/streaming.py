"""An answer while it is written: thinking, words, codes and sound as events, each with the time at which it was there.

    for event in stream_answer(model, batch, tokenizer, config, token2wav=voice):
        ...

Codes become sound between the steps of the language model, in the same thread: what is told is what one core can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_echat.contracts import GeneratedReply, PackedBatch
from lightning_echat.conversation import ConversationMemory
from lightning_echat.decoding import DecodingConfig, Generation
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.token2wav.chunks import ChunkConfig, WaveformStream
from lightning_echat.nn.token2wav.interface import Token2Wav
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """Something that an answer holds, as soon as it is there.

    Attributes:
        kind: "done" comes last and once.
        at: Seconds since the question was put.
        text: A piece of the thinking or of the words, as written.
        codes: Speech codes.
        waveform: [samples] float32, the piece that follows what came before.
        reply: With "done": the whole answer.
        timing: With "done": what took how long.
    """

    kind: Literal["thinking", "text", "codes", "audio", "done"]
    at: float
    text: str = ""
    codes: tuple[int, ...] = ()
    waveform: Tensor | None = None
    reply: GeneratedReply | None = None
    timing: AnswerTiming | None = None


@dataclass(slots=True, kw_only=True)
class AnswerTiming:
    """What a user waits for, in seconds; None for what the answer does not hold.

    Attributes:
        prefill: Encoder and reading of the prompt.
        prompt_ids, reused_ids: Length of the prompt, and how much of it an earlier turn had left in memory.
        thinking_ids, thinking: Ids of thinking, and the time from the prompt's end to theirs.
        first_text, first_code, first_audio: From the question to the first of each.
        first_audio_after_thinking: The same from the end of the thinking, or of the prompt where there is none.
        codes, audio: Speech codes, and seconds of sound.
        codes_rtf: Time spent writing speech ids per second of sound; below 1 is faster than it is heard.
        token2wav_rtf: Time spent making the waveform per second of sound.
        stalls: Silences that a listener hears between pieces, playing from the first piece on.
        stall_seconds, longest_stall: Together, and the longest.
        total: From the question to the end.
    """

    prefill: float
    prompt_ids: int = 0
    reused_ids: int = 0
    thinking_ids: int = 0
    thinking: float = 0.0
    first_text: float | None = None
    first_code: float | None = None
    first_audio: float | None = None
    first_audio_after_thinking: float | None = None
    codes: int = 0
    audio: float = 0.0
    codes_rtf: float | None = None
    token2wav_rtf: float | None = None
    stalls: int = 0
    stall_seconds: float = 0.0
    longest_stall: float = 0.0
    total: float = 0.0


def stream_answer(
    model: EChatModel,
    batch: PackedBatch,
    tokenizer: DialogueTokenizer,
    config: DecodingConfig,
    *,
    token2wav: Token2Wav | None = None,
    chunks: ChunkConfig | None = None,
    memory: ConversationMemory | None = None,
) -> Iterator[StreamEvent]:
    """Answer one dialogue, event by event. The answer is that of `decoding.generate`.

    Args:
        model: In eval mode.
        batch: Of one dialogue.
        tokenizer: Templates and ids.
        config: Lengths and sampling.
        token2wav: Makes the sound; without it there are codes and no "audio".
        chunks: How the sound is cut.
        memory: What earlier turns left, and where this one is kept.

    Raises:
        ValueError: The batch holds another number of dialogues than one.
    """
    if len(batch.references) != 1:
        raise ValueError(f"one answer can be streamed at a time, not {len(batch.references)}")
    started = time.perf_counter()
    generation = Generation(model, batch, tokenizer, config, memory=memory)
    voice = WaveformStream(token2wav, chunks) if token2wav is not None else None
    answer = _Answer(generation, tokenizer, voice, started=started)
    answer.timing.prompt_ids = batch.references[0].prompt_length
    answer.timing.reused_ids = memory.reused if memory is not None else 0
    while not generation.done:
        began = time.perf_counter()
        generation.step()
        yield from answer.take_id(began)
    yield from answer.finish()


class _Answer:
    """Turns the ids of one row into events, and takes the time."""

    def __init__(
        self, generation: Generation, tokenizer: DialogueTokenizer, voice: WaveformStream | None, *, started: float
    ) -> None:
        self.timing = AnswerTiming(prefill=generation.prefill_seconds)
        self._generation = generation
        self._writer = generation.writers[0]
        self._vocabulary = tokenizer.vocabulary
        self._spelling = _Spelling(tokenizer)
        self._voice = voice
        self._started = started
        self._thought = self._now()  # when the thinking was over
        self._codes: list[int] = []  # not yet told
        self._text_kind: Literal["thinking", "text"] = "text"
        self._speech_seconds = self._voice_seconds = 0.0
        self._played: list[tuple[float, float]] = []  # of each piece: when it came, how long it is

    def take_id(self, began: float) -> Iterator[StreamEvent]:
        """The events that the last step's id brings about. `began` is when the step began."""
        written = self._writer.written
        id, phase = written.ids[-1], written.phases[-1]
        if phase == "speech":
            self._speech_seconds += time.perf_counter() - began
            yield from self._take_speech(id)
            return
        yield from self._tell_codes()
        self._text_kind = phase
        if phase == "thinking":
            self.timing.thinking_ids += 1
            self._thought = self._now()
            self.timing.thinking = self._thought - self.timing.prefill
        elif self.timing.first_text is None:
            self.timing.first_text = self._now()
        if id != self._vocabulary.end_of_text and (piece := self._spelling.add(id)):
            yield StreamEvent(kind=phase, at=self._now(), text=piece)

    def _take_speech(self, id: int) -> Iterator[StreamEvent]:
        if id == self._vocabulary.speech_boundary:
            return
        if self.timing.first_code is None:
            self.timing.first_code = self._now()
        code = id - self._vocabulary.first_code
        self._codes.append(code)
        self.timing.codes += 1
        if self._voice is not None:
            yield from self._sound(lambda voice: voice.push([code]))
        elif len(self._codes) == SPEECH_CHUNK:
            yield from self._tell_codes()

    def _sound(self, make: Callable[[WaveformStream], list[Tensor]]) -> Iterator[StreamEvent]:
        """The pieces that are complete, after the codes that they are made of."""
        assert self._voice is not None
        began = time.perf_counter()
        pieces = make(self._voice)
        self._voice_seconds += time.perf_counter() - began
        for piece in pieces:
            yield from self._tell_codes()
            now, seconds = self._now(), len(piece) / self._voice.sample_rate
            self._played.append((now, seconds))
            self.timing.audio += seconds
            if self.timing.first_audio is None:
                self.timing.first_audio = now
                self.timing.first_audio_after_thinking = now - self._thought
            yield StreamEvent(kind="audio", at=now, waveform=piece)

    def _tell_codes(self) -> Iterator[StreamEvent]:
        if self._codes:
            codes, self._codes = tuple(self._codes), []
            yield StreamEvent(kind="codes", at=self._now(), codes=codes)

    def finish(self) -> Iterator[StreamEvent]:
        """What is left, and the end."""
        if tail := self._spelling.rest():
            yield StreamEvent(kind=self._text_kind, at=self._now(), text=tail)
        if self._voice is not None:
            yield from self._sound(WaveformStream.finish)
        yield from self._tell_codes()
        timing = self.timing
        if timing.audio:
            timing.codes_rtf = self._speech_seconds / timing.audio
            timing.token2wav_rtf = self._voice_seconds / timing.audio
        waits = playback_waits(self._played)
        timing.stalls = sum(wait > 0 for wait in waits)
        timing.stall_seconds, timing.longest_stall = sum(waits), max(waits, default=0.0)
        timing.total = self._now()
        (reply,) = self._generation.replies()
        yield StreamEvent(kind="done", at=timing.total, reply=reply, timing=timing)

    def _now(self) -> float:
        return time.perf_counter() - self._started


class _Spelling:
    """Text ids to pieces of text; a character whose bytes are several ids is told when it is whole."""

    def __init__(self, tokenizer: DialogueTokenizer) -> None:
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._told = 0  # characters of the spelled ids that are out

    def add(self, id: int) -> str:
        """What can be told after one more id."""
        self._ids.append(id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self._told = text[self._told :], len(text)
        # Context for the next ids, whose spelling may depend on what stands before them; all of it would cost a
        # square of the length.
        if len(self._ids) > 2 * _CONTEXT:
            self._ids = self._ids[-_CONTEXT:]
            self._told = len(self._decode(self._ids))
        return piece

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._decode(self._ids)[self._told :]


_CONTEXT = 8


def playback_waits(pieces: Sequence[tuple[float, float]]) -> list[float]:
    """How long a listener waits in silence before each piece but the first.

    Args:
        pieces: (when it came, how long it is) in seconds. Playing begins with the first and never skips.
    """
    waits: list[float] = []
    heard_until: float | None = None
    for came, seconds in pieces:
        if heard_until is None:
            heard_until = came
        else:
            waits.append(max(0.0, came - heard_until))
        heard_until = max(heard_until, came) + seconds
    return waits
