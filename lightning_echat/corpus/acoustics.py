"""From a synthesizer's output to something that a microphone in a room might have heard.

All arrays are [samples] float32 at `SAMPLE_RATE` unless a name says otherwise. Nothing here clips: `limit_peak` scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len
from scipy.signal import lfilter, oaconvolve, resample_poly

from lightning_echat.contracts import SAMPLE_RATE

Samples = NDArray[np.float32]

SILENCE = 2e-3
"""Amplitude under which a sample counts as silence."""

PEAK = 0.95
"""No recording is louder at any sample."""

_TILT_CORNER_HZ = 1000.0
_LOW_SHELF_HZ, _HIGH_SHELF_HZ = 250.0, 3000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Where and with what an utterance was recorded.

    Attributes:
        decay_seconds: Time until the reverberation has fallen by 60 dB.
        wetness: Loudness of the reverberation relative to the direct sound.
        noise_snr_db: Speech over background noise.
        noise_colour: Exponent of the noise spectrum 1/f^colour: 0 white, 2 brown.
        shelf_db: Gain below 250 Hz and above 3 kHz.
    """

    decay_seconds: float
    wetness: float
    noise_snr_db: float
    noise_colour: float
    shelf_db: tuple[float, float]


def draw_room(rng: np.random.Generator, *, shelf_db: tuple[float, float]) -> Room:
    """A random room and background noise around a speaker's microphone."""
    return Room(
        decay_seconds=rng.uniform(0.05, 0.35),
        wetness=rng.uniform(0.1, 0.6),
        noise_snr_db=rng.uniform(15, 35),
        noise_colour=rng.uniform(0, 2),
        shelf_db=shelf_db,
    )


def to_sample_rate(samples: Samples) -> Samples:
    """22,050 Hz -> `SAMPLE_RATE`."""
    return resample_poly(samples, 320, 441).astype(np.float32)


def trim_silence(samples: Samples, *, threshold: float = SILENCE) -> Samples:
    """Without what lies under `threshold` at either end; silence at the ends would give emotions away."""
    loud = np.flatnonzero(np.abs(samples) > threshold)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples[:0]


def rms_db(samples: Samples) -> float:
    """Level in dB full scale of the loud half of the 20 ms frames, so that pauses do not count."""
    frame = SAMPLE_RATE // 50
    usable = samples[: max(frame, samples.size - samples.size % frame)]
    power = np.square(usable, dtype=np.float64).reshape(-1, min(frame, usable.size)).mean(axis=1)
    return float(10 * np.log10(np.sort(power)[power.size // 2 :].mean() + 1e-12))


def shelf(samples: Samples, *, corner_hz: float, gain_db: float, high: bool) -> Samples:
    """Gain above (`high`) or below a corner frequency, first order."""
    factor = 10 ** (gain_db / 20)
    # A one-pole low-pass splits the signal in two bands that add up to the signal again.
    pole = np.exp(-2 * np.pi * corner_hz / SAMPLE_RATE)
    low, rest = (1, factor - 1) if not high else (factor, 1 - factor)
    return np.asarray(lfilter([low + rest * (1 - pole), -low * pole], [1, -pole], samples), dtype=np.float32)


def shape_speech(
    samples: Samples, *, tilt_db: float, drive: float, tremor_hz: float, tremor_depth: float, level_db: float
) -> Samples:
    """What an emotion and an age do to the spectrum and the energy.

    Args:
        samples: Speech, trimmed.
        tilt_db: Gain above 1 kHz.
        drive: Soft clipping; 0 for none.
        tremor_hz: Rate of an amplitude tremor.
        tremor_depth: Its depth, 0 for none.
        level_db: Loudness to reach, dB full scale (see `rms_db`).
    """
    if tilt_db:
        samples = shelf(samples, corner_hz=_TILT_CORNER_HZ, gain_db=tilt_db, high=True)
    if drive:
        scaled = drive * samples / np.abs(samples).max()
        samples = np.tanh(scaled) / np.tanh(drive)
    if tremor_depth:
        phase = 2 * np.pi * tremor_hz * np.arange(samples.size) / SAMPLE_RATE
        samples = samples * (1 + tremor_depth * np.sin(phase)).astype(np.float32)
    return (samples * 10 ** ((level_db - rms_db(samples)) / 20)).astype(np.float32)


def _reverberate(samples: Samples, *, room: Room, rng: np.random.Generator) -> Samples:
    """The sound and an exponentially decaying tail of it; as long as before plus the audible part of the tail."""
    time = np.arange(round(room.decay_seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.normal(size=time.size) * 10 ** (-3 * time / room.decay_seconds)
    # First reflections arrive after some milliseconds, not at once.
    tail[: SAMPLE_RATE // 250] = 0
    impulse = room.wetness * tail / np.sqrt(np.square(tail).sum())
    impulse[0] = 1.0
    return oaconvolve(samples, impulse.astype(np.float32)).astype(np.float32)


def coloured_noise(count: int, *, colour: float, rng: np.random.Generator) -> Samples:
    """[count] of noise with spectrum 1/f^colour and RMS 1, flat below 60 Hz."""
    length = cast(int, next_fast_len(count, real=True))
    frequency = np.maximum(np.arange(length // 2 + 1) * SAMPLE_RATE / length, 60.0).astype(np.float32)
    spectrum = rng.standard_normal((2, length // 2 + 1), dtype=np.float32)
    shaped = (spectrum[0] + 1j * spectrum[1]) * frequency ** (-colour / 2)
    noise = np.asarray(irfft(shaped, n=length))[:count]
    return (noise / np.sqrt(np.square(noise).mean())).astype(np.float32)


def record(samples: Samples, *, room: Room, rng: np.random.Generator) -> Samples:
    """The samples as heard in a room: microphone colour, reverberation, noise; trimmed again before the noise."""
    level = rms_db(samples)
    for corner, gain, high in zip((_LOW_SHELF_HZ, _HIGH_SHELF_HZ), room.shelf_db, (False, True), strict=True):
        samples = shelf(samples, corner_hz=corner, gain_db=gain, high=high)
    heard = trim_silence(_reverberate(samples, room=room, rng=rng))
    # The microphone's colour must not move the loudness, which the speaker and the emotion decide.
    heard = heard * 10 ** ((level - rms_db(heard)) / 20)
    noise = coloured_noise(heard.size, colour=room.noise_colour, rng=rng) * 10 ** ((level - room.noise_snr_db) / 20)
    return limit_peak((heard + noise).astype(np.float32))


def limit_peak(samples: Samples, *, peak: float = PEAK) -> Samples:
    """The samples, scaled down where they would exceed `peak`."""
    loudest = float(np.abs(samples).max(initial=0.0))
    return samples * np.float32(peak / loudest) if loudest > peak else samples
