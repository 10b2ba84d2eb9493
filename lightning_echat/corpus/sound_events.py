"""Sounds that people make beside words, from noise and buzzes: cough, laugh, sneeze, sigh, cry.

Each is shaped by the speaker's vocal tract (formant scale) and pitch, so that a child's cough is a child's.
All arrays are [samples] at `SAMPLE_RATE`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from lightning_echat.contracts import SAMPLE_RATE

Samples = NDArray[np.float32]

_OPEN_VOWEL = (750.0, 1250.0, 2600.0, 3500.0)
_NEUTRAL_VOWEL = (520.0, 1500.0, 2500.0, 3500.0)
_ROUND_VOWEL = (350.0, 900.0, 2300.0, 3300.0)


def make_event(event: str, *, f0: float, formant_scale: float, rng: np.random.Generator) -> Samples:
    """One sound event, peak 1.

    Args:
        event: "cough", "laugh", "sneeze", "sigh" or "cry".
        f0: Hz, the speaker's middle pitch.
        formant_scale: The speaker's vocal tract relative to 1.
        rng: Draws counts and durations.

    Returns:
        [samples], 0.25 to 2 s.
    """
    maker = {"cough": _cough, "laugh": _laugh, "sneeze": _sneeze, "sigh": _sigh, "cry": _cry}[event]
    samples = maker(f0, formant_scale, rng)
    return (samples / np.abs(samples).max()).astype(np.float32)


def _time(seconds: float) -> NDArray[np.float64]:
    """[samples] seconds since the start."""
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _pause(seconds: float) -> NDArray[np.float64]:
    """[samples] of silence."""
    return np.zeros(round(seconds * SAMPLE_RATE))


def _buzz(f0: NDArray[np.float64]) -> NDArray[np.float64]:
    """A voice's source: a falling saw tooth that follows the pitch contour (Hz, [samples])."""
    phase = np.cumsum(f0 / SAMPLE_RATE)
    return 1.0 - 2.0 * (phase % 1.0)


def _formants(
    source: NDArray[np.float64], *, vowel: Sequence[float], scale: float, width: float
) -> NDArray[np.float64]:
    """The source through parallel resonances at the vowel's frequencies times `scale`, `width` Hz wide."""
    out = np.zeros_like(source)
    for number, frequency in enumerate(vowel):
        centre = min(frequency * scale, 0.45 * SAMPLE_RATE)
        radius = np.exp(-np.pi * width * (1 + 0.3 * number) / SAMPLE_RATE)
        angle = 2 * np.pi * centre / SAMPLE_RATE
        resonance = lfilter([1 - radius, 0, radius - 1], [1, -2 * radius * np.cos(angle), radius**2], source)
        out += np.asarray(resonance) / (1 + number)
    return out


def _hump(count: int, *, rise: float) -> NDArray[np.float64]:
    """[count] envelope from 0 up to 1 at the share `rise`, and down to 0, without corners."""
    place = np.linspace(0, 1, count)
    warped = np.where(place < rise, 0.5 * place / rise, 0.5 + 0.5 * (place - rise) / (1 - rise))
    return np.sin(np.pi * warped) ** 2


def _cough(f0: float, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """One to three bursts of noise through wide formants, with a decay of 30 to 60 ms and a little voice."""
    parts = []
    for _ in range(rng.integers(1, 4)):
        time = _time(rng.uniform(0.20, 0.30))
        burst = rng.normal(size=time.size) * np.exp(-time / rng.uniform(0.03, 0.06)) * np.minimum(1, time / 0.004)
        after = 0.35 * rng.normal(size=time.size) * np.exp(-time / 0.09)
        voice = 0.8 * _buzz(np.full(time.size, 0.9 * f0)) * np.exp(-(((time - 0.07) / 0.04) ** 2))
        parts += [_formants(burst + after + voice, vowel=_NEUTRAL_VOWEL, scale=scale, width=350)]
        parts += [_pause(rng.uniform(0.03, 0.12))]
    return np.concatenate(parts)


def _laugh(f0: float, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Four to six syllables "ha", 4.5 to 6.5 a second, the pitch falling."""
    count = int(rng.integers(4, 7))
    length = 1 / rng.uniform(4.5, 6.5)
    parts = []
    for number in range(count):
        time = _time(length)
        pitch = 1.35 * f0 * (1 - 0.35 * number / count) * (1 - 0.15 * time / length)
        voice = _buzz(pitch) * _hump(time.size, rise=0.45) * (time > 0.25 * length)
        aspiration = 0.5 * rng.normal(size=time.size) * _hump(time.size, rise=0.2)
        loudness = 1 - 0.4 * number / count
        parts.append(loudness * _formants(voice + aspiration, vowel=_OPEN_VOWEL, scale=scale, width=130))
    return np.concatenate(parts)


def _sneeze(f0: float, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A breathy inhale that rises, a gap, a high-passed burst that ends in a short vowel."""
    time = _time(rng.uniform(0.30, 0.50))
    inhale = 0.35 * rng.normal(size=time.size) * (time / time[-1]) ** 2
    inhale += 0.25 * _buzz(f0 * (1 + 0.4 * time / time[-1])) * (time / time[-1]) ** 2
    inhale = _formants(inhale, vowel=_OPEN_VOWEL, scale=1.1 * scale, width=250)
    time = _time(rng.uniform(0.22, 0.32))
    burst = rng.normal(size=time.size) * np.exp(-time / rng.uniform(0.05, 0.09)) * np.minimum(1, time / 0.005)
    burst = 0.5 * np.asarray(lfilter([1, -0.97], [1], burst))
    vowel = 0.7 * _buzz(1.2 * f0 * (1 - 0.5 * time / time[-1])) * np.exp(-(((time - 0.09) / 0.05) ** 2))
    return np.concatenate(
        [inhale, _pause(rng.uniform(0.05, 0.10)), burst + _formants(vowel, vowel=_ROUND_VOWEL, scale=scale, width=150)]
    )


def _sigh(f0: float, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """0.6 to 0.95 s of shaped breath over a voice that falls."""
    time = _time(rng.uniform(0.60, 0.95))
    envelope = _hump(time.size, rise=0.25)
    breath = rng.normal(size=time.size) * envelope
    voice = 0.35 * _buzz(1.05 * f0 * (1 - 0.40 * time / time[-1])) * envelope**2
    return _formants(breath + voice, vowel=_NEUTRAL_VOWEL, scale=0.95 * scale, width=220)


def _cry(f0: float, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Spasmodic inhales, then a wail with a tremor of 6 to 9 Hz in pitch and loudness."""
    parts = []
    for _ in range(rng.integers(2, 4)):
        size = _time(rng.uniform(0.07, 0.11)).size
        sniff = 0.5 * rng.normal(size=size) * _hump(size, rise=0.7)
        parts += [_formants(sniff, vowel=_OPEN_VOWEL, scale=1.2 * scale, width=300), _pause(rng.uniform(0.04, 0.08))]
    time = _time(rng.uniform(0.55, 0.85))
    tremor = np.sin(2 * np.pi * rng.uniform(6, 9) * time)
    pitch = 1.45 * f0 * (1 - 0.25 * time / time[-1]) * (1 + 0.05 * tremor)
    wail = _buzz(pitch) * _hump(time.size, rise=0.2) * (1 + 0.5 * tremor)
    wail += 0.08 * rng.normal(size=time.size) * _hump(time.size, rise=0.2)
    parts.append(_formants(wail, vowel=_OPEN_VOWEL, scale=scale, width=120))
    return np.concatenate(parts)
