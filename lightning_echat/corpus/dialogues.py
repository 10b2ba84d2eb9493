"""Dialogues of the corpus: first as a script (words, labels, speaker), then voiced.

Both halves are pure functions of (seed, split, index): a dialogue is the same whichever process makes it, after
whatever, in shards of whatever size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, Turn
from lightning_echat.corpus.acoustics import (
    draw_room,
    limit_peak,
    record,
    rms_db,
    shape_speech,
    to_sample_rate,
    trim_silence,
)
from lightning_echat.corpus.espeak import Espeak
from lightning_echat.corpus.queries import draw_query
from lightning_echat.corpus.replies import choose_reply_emotion, neutral_reply, write_reply
from lightning_echat.corpus.sound_events import make_event
from lightning_echat.corpus.voices import (
    ASSISTANT,
    REPLY_PROSODY,
    Age,
    Gender,
    Prosody,
    Speaker,
    draw_speaker,
    express,
    user_prosody,
)
from lightning_echat.tokens.thinking import write_natural_thinking

Samples = NDArray[np.float32]

AGES: tuple[Age, ...] = ("child", "adult", "old")
GENDERS: tuple[Gender, ...] = ("female", "male")
EMOTIONS = ("happy", "sad", "angry", "surprise")
"""Emotions beside neutral; each occurs equally often."""
EVENTS = ("cough", "laugh", "sneeze", "sigh", "cry")
"""Events beside none."""

CUE_SHARES = {"multi": 0.48, "emotion": 0.26, "event": 0.12, "speaker": 0.14}
"""Share of user turns by which cues they carry beside age and gender: emotion and event, one of them, or neither."""

TURN_SHARES = {1: 0.90, 2: 0.08, 3: 0.02}
"""Share of dialogues by their number of questions."""

SPEECH_LEVEL_DB = -27.0
"""Full-scale level of an ordinary voice; speakers and emotions differ from it."""

REPLY_LEVEL_DB = -24.0
EVENT_PEAK = 0.75

_SPEAKER_STREAM, _SCRIPT_STREAM, _VOICE_STREAM = 1, 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A part of the corpus with its own speakers.

    Attributes:
        name: Folder of the split.
        number: Part of every seed in the split; never reused for another split.
        dialogues, speakers: How many.
        klatt: True for voices with the vocal tract that training never hears.
        reserved: True for texts that training never uses.
        spoken: False for text-to-text pairs.
    """

    name: str
    number: int
    dialogues: int = 0
    speakers: int = 0
    klatt: bool = False
    reserved: bool = False
    spoken: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A question and its answer, in words."""

    query: str
    labels: dict[str, str]
    reply: str
    reply_emotion: str
    thinking: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A dialogue before anybody speaks it. `speaker` is None for a written dialogue."""

    key: str
    speaker: Speaker | None
    exchanges: tuple[Exchange, ...]


def _stream(seed: int, split: Split, purpose: int, index: int) -> np.random.Generator:
    """The random numbers of one thing in the corpus, independent of all others'."""
    return np.random.default_rng([seed, split.number, purpose, index])


@functools.lru_cache(maxsize=1024)
def speaker_of(split: Split, *, index: int, seed: int) -> Speaker:
    """Speaker number `index` of a split; ages and genders take turns, so that every combination is as frequent."""
    return draw_speaker(
        _stream(seed, split, _SPEAKER_STREAM, index),
        name=f"{split.name}-s{index:04d}",
        age=AGES[index % 3],
        gender=GENDERS[index // 3 % 2],
        klatt=split.klatt,
    )


def draw_cues(rng: np.random.Generator) -> dict[str, str]:
    """Emotion and event of one user turn."""
    cues = rng.choice(list(CUE_SHARES), p=list(CUE_SHARES.values()))
    return {
        "emotion": str(rng.choice(EMOTIONS)) if cues in ("multi", "emotion") else "neutral",
        "event": str(rng.choice(EVENTS)) if cues in ("multi", "event") else "none",
    }


def write_script(split: Split, *, index: int, seed: int) -> Script:
    """The words and labels of dialogue `index`."""
    rng = _stream(seed, split, _SCRIPT_STREAM, index)
    key = f"{split.name}-{index:06d}"
    if not split.spoken:
        query = draw_query(rng, reserved=split.reserved)
        exchange = Exchange(
            query=query.text, labels={}, reply=neutral_reply(query.topic), reply_emotion="neutral", thinking=None
        )
        return Script(key=key, speaker=None, exchanges=(exchange,))
    speaker = speaker_of(split, index=index % split.speakers, seed=seed)
    turns = int(rng.choice(list(TURN_SHARES), p=list(TURN_SHARES.values())))
    exchanges = tuple(_write_exchange(speaker, reserved=split.reserved, rng=rng) for _ in range(turns))
    return Script(key=key, speaker=speaker, exchanges=exchanges)


def _write_exchange(speaker: Speaker, *, reserved: bool, rng: np.random.Generator) -> Exchange:
    """A question of the speaker, and an answer that takes up everything to be heard in it."""
    query = draw_query(rng, reserved=reserved)
    labels = {"age": speaker.age, "gender": speaker.gender, **draw_cues(rng)}
    reply_emotion = choose_reply_emotion(labels)
    return Exchange(
        query=query.text,
        labels=labels,
        reply=write_reply(query.topic, labels=labels),
        reply_emotion=reply_emotion,
        thinking=write_natural_thinking(query.text, labels, reply_emotion),
    )


def voice_script(script: Script, *, split: Split, index: int, seed: int, espeak: Espeak) -> DialogueSample:
    """The script as a dialogue with audio (or without, for a written one)."""
    rng = _stream(seed, split, _VOICE_STREAM, index)
    turns = []
    for exchange in script.exchanges:
        question = Turn(role="user", text=exchange.query, labels=dict(exchange.labels))
        answer = Turn(
            role="assistant",
            text=exchange.reply,
            labels={"emotion": exchange.reply_emotion},
            thinking=exchange.thinking,
        )
        if script.speaker is not None:
            question.audio = torch.from_numpy(voice_query(exchange, speaker=script.speaker, rng=rng, espeak=espeak))
            answer.audio = torch.from_numpy(voice_reply(exchange, rng=rng, espeak=espeak))
        turns += [question, answer]
    speaker, voice_type = (script.speaker.name, script.speaker.voice_type) if script.speaker else ("", "")
    return DialogueSample(turns=turns, key=script.key, speaker=speaker, voice_type=voice_type)


def _speak(
    text: str, *, speaker: Speaker, prosody: Prosody, level_db: float, rng: np.random.Generator, espeak: Espeak
) -> Samples:
    """Dry speech without silence at its ends, [samples] at `SAMPLE_RATE`."""
    settings = express(speaker, prosody=prosody)
    noise_seed = int(rng.integers(1, 2**31))
    spoken = espeak.speak(text, voice_lines=settings.lines, rate=settings.rate, noise_seed=noise_seed)
    return shape_speech(
        trim_silence(to_sample_rate(spoken)),
        tilt_db=settings.tilt_db,
        drive=settings.drive,
        tremor_hz=settings.tremor_hz,
        tremor_depth=settings.tremor_depth,
        level_db=level_db + settings.gain_db,
    )


def voice_query(exchange: Exchange, *, speaker: Speaker, rng: np.random.Generator, espeak: Espeak) -> Samples:
    """A user's question: speech, its sound event before or after, in a room. [samples] at `SAMPLE_RATE`."""
    prosody = user_prosody(exchange.labels["emotion"], intensity=rng.uniform(1.0, 1.4))
    speech = _speak(exchange.query, speaker=speaker, prosody=prosody, level_db=SPEECH_LEVEL_DB, rng=rng, espeak=espeak)
    if exchange.labels["event"] != "none":
        event = _event_beside(speech, event=exchange.labels["event"], speaker=speaker, rng=rng)
        gap = np.zeros(round(rng.uniform(0.05, 0.20) * SAMPLE_RATE), np.float32)
        speech = np.concatenate([event, gap, speech] if rng.random() < 0.5 else [speech, gap, event])
    return record(speech, room=draw_room(rng, shelf_db=speaker.shelf_db), rng=rng)


def _event_beside(speech: Samples, *, event: str, speaker: Speaker, rng: np.random.Generator) -> Samples:
    """A sound event about as loud as the speech, never clipping."""
    sound = make_event(event, f0=speaker.f0, formant_scale=speaker.formant_scale, rng=rng)
    gain_db = rms_db(speech) + rng.uniform(-4, 2) - rms_db(sound)
    return limit_peak((sound * 10 ** (gain_db / 20)).astype(np.float32), peak=EVENT_PEAK)


def voice_reply(exchange: Exchange, *, rng: np.random.Generator, espeak: Espeak) -> Samples:
    """The assistant's answer: one voice, close to the microphone, prosody by the reply's emotion."""
    prosody = REPLY_PROSODY[exchange.reply_emotion]
    return limit_peak(
        _speak(exchange.reply, speaker=ASSISTANT, prosody=prosody, level_db=REPLY_LEVEL_DB, rng=rng, espeak=espeak)
    )
