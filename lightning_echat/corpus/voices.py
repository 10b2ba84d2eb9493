"""Random speakers, and what age, gender and emotion do to a voice.

A speaker is drawn once; `express` turns speaker and emotion into the lines of an espeak-ng voice file and into the
effects that `acoustics` applies afterwards. The figures are those of the trial in docs/corpus.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Age = Literal["child", "adult", "old"]
Gender = Literal["female", "male"]

_F0 = {
    ("child", "male"): (225, 275),
    ("child", "female"): (295, 360),
    ("adult", "male"): (88, 135),
    ("adult", "female"): (170, 230),
    ("old", "male"): (95, 150),
    ("old", "female"): (140, 195),
}
_FORMANT_SCALE = {
    ("child", "male"): (1.22, 1.31),
    ("child", "female"): (1.34, 1.46),
    ("adult", "male"): (0.93, 1.03),
    ("adult", "female"): (1.09, 1.20),
    ("old", "male"): (0.90, 1.01),
    ("old", "female"): (1.04, 1.15),
}
_RATE = {"child": (160, 190), "adult": (165, 195), "old": (122, 145)}
_SPAN = {"child": (0.42, 0.55), "adult": (0.28, 0.50), "old": (0.28, 0.45)}
_LANGUAGES = ("en-us", "en-gb", "en-gb-x-rp", "en-us-nyc")
_KLATT_MODELS = (2, 4)
_FORMANTS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A voice, apart from what it feels.

    Attributes:
        name: Unique in the corpus.
        age, gender: Labels.
        language: espeak-ng's name of the accent.
        klatt: 0 for the library's usual vocal tract, otherwise the number of a Klatt model.
        f0: Hz, middle of the range.
        span: Width of the F0 range as a share of `f0`.
        rate: Words a minute.
        formant_scale: Vocal tract, 1 for the library's own.
        formants: (frequency %, height %, width %) for formants 0 to 8.
        flutter, roughness, breath: Units of the voice file.
        tremor_hz, tremor_depth: Amplitude tremor.
        loudness_db: dB relative to the corpus' usual level.
        shelf_db: Gain of a low and a high shelf, the microphone's colour.
    """

    name: str
    age: Age
    gender: Gender
    language: str
    klatt: int
    f0: float
    span: float
    rate: float
    formant_scale: float
    formants: tuple[tuple[int, int, int], ...]
    flutter: int
    roughness: int
    breath: int
    tremor_hz: float = 0.0
    tremor_depth: float = 0.0
    loudness_db: float = 0.0
    shelf_db: tuple[float, float] = (0.0, 0.0)

    @property
    def voice_type(self) -> str:
        """For instance "old-female", or "klatt-old-female" with a vocal tract that training never hears."""
        return f"{'klatt-' if self.klatt else ''}{self.age}-{self.gender}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prosody:
    """Factors and offsets that an emotion applies to a speaker.

    Attributes:
        rate, f0, span: Factors.
        tilt_db: dB gained above 1 kHz.
        gain_db: dB of loudness.
        breath, roughness: Added to the speaker's.
        intonation: espeak-ng's intonation pattern, 1 to 4.
        stress: Added to stressed syllables' length.
        drive: Soft clipping, 0 for none.
    """

    rate: float = 1.0
    f0: float = 1.0
    span: float = 1.0
    tilt_db: float = 0.0
    gain_db: float = 0.0
    breath: int = 0
    roughness: int = 0
    intonation: int = 1
    stress: int = 0
    drive: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceSettings:
    """What the synthesizer and the effects after it need to say one sentence."""

    lines: tuple[str, ...]
    rate: int
    tilt_db: float
    gain_db: float
    drive: float
    tremor_hz: float
    tremor_depth: float


def user_prosody(emotion: str, *, intensity: float) -> Prosody:
    """How a user's emotion sounds. `intensity` is 1 to 1.4."""
    k = intensity
    match emotion:
        case "neutral":
            return Prosody()
        case "happy":
            return Prosody(rate=1 + 0.16 * k, f0=1 + 0.20 * k, span=1 + 1.10 * k, tilt_db=3 * k, gain_db=1, stress=20)
        case "sad":
            return Prosody(
                rate=1 - 0.24 * k,
                f0=1 - 0.12 * k,
                span=1 - 0.60 * k,
                tilt_db=-7 * k,
                gain_db=-4,
                breath=25,
                intonation=3,
            )
        case "angry":
            return Prosody(
                rate=1 + 0.14 * k, f0=1 + 0.05 * k, span=1 + 0.25 * k, tilt_db=6 * k, gain_db=4, roughness=2, stress=30,
                drive=1.5,
            )  # fmt: skip
        case "surprise":
            return Prosody(rate=1 - 0.14 * k, f0=1 + 0.30 * k, span=1 + 1.80 * k, intonation=4)
    raise ValueError(f"no prosody for emotion {emotion!r}")


REPLY_PROSODY: dict[str, Prosody] = {
    "neutral": Prosody(),
    "happy": Prosody(rate=1.08, f0=1.16, span=1.7, tilt_db=2.0),
    "comforting": Prosody(rate=0.86, f0=0.90, span=0.6, tilt_db=-3.0, breath=10),
    "calm": Prosody(rate=0.93, f0=0.94, span=0.5, tilt_db=-1.0),
    "curious": Prosody(rate=1.0, f0=1.10, span=1.9, intonation=4),
    "worried": Prosody(rate=0.97, f0=1.05, span=0.7, intonation=3),
}
"""How the assistant speaks a reply emotion; loudness stays the same."""

ASSISTANT = Speaker(
    name="assistant",
    age="adult",
    gender="female",
    language="en-us",
    klatt=0,
    f0=160.0,
    span=0.4,
    rate=215.0,
    formant_scale=1.08,
    formants=tuple((108, 100, 100) for _ in range(_FORMANTS)),
    flutter=2,
    roughness=0,
    breath=0,
)
"""The one voice of every reply."""


def draw_speaker(rng: np.random.Generator, *, name: str, age: Age, gender: Gender, klatt: bool) -> Speaker:
    """A random speaker of an age and gender; `klatt` gives it a vocal tract model of the held-out type."""
    old = age == "old"
    formant_scale = rng.uniform(*_FORMANT_SCALE[age, gender])
    return Speaker(
        name=name,
        age=age,
        gender=gender,
        language=_LANGUAGES[rng.integers(len(_LANGUAGES))],
        klatt=int(rng.choice(_KLATT_MODELS)) if klatt else 0,
        f0=rng.uniform(*_F0[age, gender]),
        span=rng.uniform(*_SPAN[age]),
        rate=rng.uniform(*_RATE[age]),
        formant_scale=formant_scale,
        formants=_draw_formants(rng, formant_scale=formant_scale, old=old),
        flutter=int(rng.integers(18, 31) if old else rng.integers(1, 8)),
        roughness=int(rng.integers(4, 7) if old else rng.integers(0, 3)),
        breath=int(rng.integers(15, 36) if old else rng.integers(0, 11)),
        tremor_hz=rng.uniform(4, 6) if old else 0.0,
        tremor_depth=rng.uniform(0.2, 0.4) if old else 0.0,
        loudness_db=rng.uniform(-6, 6),
        shelf_db=(rng.uniform(-6, 6), rng.uniform(-6, 6)),
    )


def _draw_formants(rng: np.random.Generator, *, formant_scale: float, old: bool) -> tuple[tuple[int, int, int], ...]:
    """Frequency, height and width per formant: the vocal tract's length with a jitter of 2.5 %, heights ±12 %."""
    formants = []
    for number in range(_FORMANTS):
        frequency = formant_scale * rng.normal(1.0, 0.025)
        height = rng.uniform(0.88, 1.12)
        if old and number >= 3:
            height *= 0.75
        formants.append((round(100 * frequency), round(100 * height), round(rng.uniform(90, 115))))
    return tuple(formants)


def express(speaker: Speaker, *, prosody: Prosody) -> VoiceSettings:
    """Speaker and prosody -> voice file, rate and effects."""
    f0 = speaker.f0 * prosody.f0
    span = max(0.04, speaker.span * prosody.span)
    breath = speaker.breath + prosody.breath
    stress = prosody.stress
    lines = [
        f"language {speaker.language}",
        # The low end stays above 50 Hz: below, the library's pitch table ends.
        f"pitch {max(50, round(f0 * (1 - 0.50 * min(span, 1.2))))} {round(f0 * (1 + 0.45 * span))}",
        *(f"formant {k} {hz} {height} {width}" for k, (hz, height, width) in enumerate(speaker.formants)),
        f"flutter {speaker.flutter}",
        f"roughness {min(7, speaker.roughness + prosody.roughness)}",
        f"breath {breath} {breath} {breath // 2} {breath // 2} {breath // 3}",
        f"intonation {prosody.intonation}",
        f"stressAdd 0 0 {stress // 2} {stress // 2} 0 0 {stress} {stress}",
    ]
    if speaker.klatt:
        lines.append(f"klatt {speaker.klatt}")
    return VoiceSettings(
        lines=tuple(lines),
        rate=round(float(np.clip(speaker.rate * prosody.rate, 80, 400))),
        tilt_db=prosody.tilt_db,
        gain_db=speaker.loudness_db + prosody.gain_db,
        drive=prosody.drive,
        tremor_hz=speaker.tremor_hz,
        tremor_depth=speaker.tremor_depth,
    )
