"""Bytes to waveforms, and the members of a shard to dialogues. Whatever is wrong ends in `SampleRejected`."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, isfinite
from typing import Any, NamedTuple, cast

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.transforms import Resample

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, SampleRejected, Turn
from lightning_echat.data.log_mel import WINDOW
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.tar_samples import SCHEMA, StoredSample
from lightning_echat.tokens.dialogue_template import expand_history
from lightning_echat.tokens.id_tensors import id_tensor
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS

SIDECAR = "json"
_WAV_HEAD = struct.Struct("<4s4x8sIHHIIHH4sI")
_PLAIN_HEAD = [b"RIFF", b"WAVEfmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16, b"data"]
"""Size of the format, PCM, channels, rate, bytes a second, bytes a frame, bits; the data's size follows."""
_CLIPPED = 0.999
_CLIPPED_SHARE = 0.001
"""More than this share of samples at full scale is audible clipping; single peaks are not."""
_CHECKED_BYTES = 4096
_MIN_COMMON_RATE = 25
"""Hz. A rate that shares less with 16 kHz needs a resampling kernel of gigabytes. Every rate in use shares more."""


@dataclass(slots=True, kw_only=True)
class ParsedDialogue:
    """A dialogue whose sidecar has been read and checked, and whose audio still is bytes.

    Attributes:
        sample: The dialogue without audio.
        audio: Encoded audio per turn, None for a written turn.
        seconds: The duration that the sidecar claims per turn, None where it claims none.
        check: 16 bits by which a checkpoint tells whether the same dialogue still stands at its place.
    """

    sample: DialogueSample
    audio: list[bytes | None]
    seconds: list[float | None]
    check: int = 0

    def prefixes(self) -> Iterator[ParsedDialogue]:
        """The dialogue up to each of its replies (see `expand_history`); the bytes are shared, not copied."""
        for sample in expand_history(self.sample):
            yield replace(self, sample=sample)


_MAX_SIDECAR_BYTES = 8 * 2**20
"""A larger one is no dialogue, and parsed it would take twenty times that."""
_MAX_VALUES = 64 * 2**20
"""Samples of all channels. A few kB of FLAC can claim, and hold, many more."""
PCM_SCALE = 1.0 / 32768.0
"""What a 16-bit sample is multiplied by to lie in [-1, 1)."""


def decode_waveform(data: bytes, *, max_seconds: float = 60.0, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """An encoded audio file -> [samples] float32 at `sample_rate`: channels averaged, resampled where needed.

    Costs about 0.05 ms for 4 s of 16 kHz WAV, 0.4 ms for FLAC, 1 ms more where it is resampled.

    Raises:
        SampleRejected: Unreadable, empty, too short for one mel window, too long, not finite, or of an odd rate.
    """
    return _as_floats(_decoded(data, max_seconds, sample_rate).samples)


class _Decoded(NamedTuple):
    """[samples] at the rate asked for, int16 where stored so and taken as they are, else float32.

    `peak` is the largest magnitude, as of floats, before any resampling.
    """

    samples: NDArray[Any]
    peak: float


def _decoded(data: bytes, max_seconds: float, sample_rate: int = SAMPLE_RATE) -> _Decoded:
    """What `decode_waveform` turns into floats; raises as it does."""
    plain = _plain_wav(data)
    rate, samples = (SAMPLE_RATE, plain) if plain is not None else _read_audio(data, max_seconds)
    if len(samples) > max_seconds * rate:
        raise SampleRejected("audio too long", f"{len(samples) / rate:.1f} s, at most {max_seconds:g} s")
    _check_length(len(samples), rate)
    # A NaN anywhere makes both ends NaN; fifteen times faster than asking each sample.
    ends = float(samples.min()), float(samples.max())
    if not all(isfinite(end) for end in ends):
        raise SampleRejected("audio not finite")
    peak = max(-ends[0], ends[1]) * (PCM_SCALE if plain is not None else 1.0)
    return _Decoded(_resample(samples, rate, sample_rate), peak)


def _as_floats(samples: NDArray[Any]) -> Tensor:
    floats = np.multiply(samples, PCM_SCALE, dtype=np.float32) if samples.dtype == np.int16 else samples
    return torch.from_numpy(np.ascontiguousarray(floats))


def _plain_wav(data: bytes) -> NDArray[np.int16] | None:
    """[samples] of 16-bit mono at `SAMPLE_RATE` in the plainest header, None for whatever else there may be.

    That is what nearly every shard holds, and libsndfile takes ten times as long.
    """
    if len(data) < _WAV_HEAD.size:
        return None
    *head, size = _WAV_HEAD.unpack_from(data)
    if head != _PLAIN_HEAD or size % 2 or size > len(data) - _WAV_HEAD.size:
        return None
    return np.frombuffer(data, dtype="<i2", count=size // 2, offset=_WAV_HEAD.size)


def _read_audio(data: bytes, max_seconds: float) -> tuple[int, NDArray[np.float32]]:
    """Sample rate and the mean of all channels, of any format that libsndfile reads."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            # Looked at before anything is decoded: a header may claim hours.
            if file.frames > max_seconds * rate:
                raise SampleRejected("audio too long", f"{file.frames / rate:.1f} s, at most {max_seconds:g} s")
            if file.frames * file.channels > _MAX_VALUES:
                raise SampleRejected("audio too large", f"{file.channels} channels of {file.frames} samples")
            samples = cast(NDArray[np.float32], file.read(dtype="float32", always_2d=True))
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise SampleRejected("unreadable audio", str(error)) from error
    return rate, samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def is_clipped(waveform: Tensor) -> bool:
    """Whether so many samples stand at full scale that one hears it. Such audio is used and only counted."""
    return float((waveform.abs() >= _CLIPPED).float().mean()) > _CLIPPED_SHARE


def _check_length(samples: int, rate: int) -> None:
    if samples == 0:
        raise SampleRejected("empty audio")
    if samples * SAMPLE_RATE < WINDOW * rate:
        raise SampleRejected("audio too short", f"{samples / rate:.4f} s, at least {WINDOW / SAMPLE_RATE} s")


def _resample(samples: NDArray[Any], rate: int, target: int) -> NDArray[Any]:
    if rate == target:
        return samples
    if gcd(rate, target) < _MIN_COMMON_RATE:
        raise SampleRejected("odd sample rate", f"{rate} Hz; convert to {target} Hz")
    return _resampler(rate, target)(_as_floats(samples)).numpy()


@lru_cache(maxsize=16)
def _resampler(rate: int, target: int) -> Resample:
    return Resample(rate, target)


def decode_dialogue(stored: StoredSample, *, max_seconds: float = 60.0) -> DialogueSample:
    """The whole dialogue with the audio of every turn. `SampleRejected` where anything is wrong."""
    parsed = parse_dialogue(stored)
    return with_audio(parsed, turns=range(len(parsed.sample.turns)), max_seconds=max_seconds)


def with_audio(
    parsed: ParsedDialogue,
    *,
    turns: Sequence[int],
    max_seconds: float,
    counter: SkipCounter | None = None,
    as_stored: bool = False,
) -> DialogueSample:
    """The dialogue with the audio of the named turns decoded; the others keep none. Clipping is counted.

    `as_stored` leaves 16-bit samples the whole numbers that they are, int16, at half the memory.
    """
    decoded = list(parsed.sample.turns)
    for index in turns:
        data = parsed.audio[index]
        if data is not None:
            samples, peak = _decoded(data, max_seconds)
            if counter is not None and peak >= _CLIPPED and is_clipped(_as_floats(samples)):
                counter.notice("clipped audio", shard=parsed.sample.shard, key=parsed.sample.key)
            # A copy where no floats are made, as the bytes it lies in cannot be written to.
            audio = torch.from_numpy(samples.copy()) if as_stored else _as_floats(samples)
            decoded[index] = replace(decoded[index], audio=audio)
    return replace(parsed.sample, turns=decoded)


def parse_dialogue(stored: StoredSample, *, source: str = "") -> ParsedDialogue:
    """Read and check the sidecar (docs/data_format.md); costs about 0.05 ms.

    Raises:
        SampleRejected: The reason says which rule is broken, the detail where.
    """
    sidecar = _sidecar(stored)
    turns: list[Turn] = []
    audio: list[bytes | None] = []
    seconds: list[float | None] = []
    for number, entry in enumerate(_field(sidecar, "turns", list, default=[])):
        if not isinstance(entry, dict):
            raise SampleRejected("broken sidecar", f"turn {number} is no object")
        turns.append(_turn(entry, number))
        audio.append(_audio_bytes(entry, stored.members))
        claimed = _field(entry, "seconds", (int, float))
        seconds.append(float(claimed) if claimed is not None else None)
    if not turns:
        raise SampleRejected("no turns")
    sample = DialogueSample(
        turns=turns,
        key=stored.key,
        shard=stored.shard,
        source=source,
        speaker=_field(sidecar, "speaker", str, default=""),
        voice_type=_field(sidecar, "voice_type", str, default=""),
    )
    return ParsedDialogue(sample=sample, audio=audio, seconds=seconds, check=_check(stored))


def _check(stored: StoredSample) -> int:
    """Of the beginnings and lengths of all members; all of their bytes would take as long as decoding them."""
    check = 0
    for name, data in stored.members.items():
        check = zlib.crc32(data[:_CHECKED_BYTES], zlib.crc32(f"{name}/{len(data)}/".encode("utf-8", "replace"), check))
    return check & 0xFFFF


def _sidecar(stored: StoredSample) -> dict[str, Any]:
    # A key is only ever a name in reports, and is never joined to a path; still nothing good holds these.
    if "/" in stored.key or "\\" in stored.key or not stored.key.isprintable():
        raise SampleRejected("bad key", "keys hold no slash and only printable characters")
    data = stored.members.get(SIDECAR)
    if data is None:
        raise SampleRejected("no sidecar", f"no member {stored.key}.{SIDECAR}")
    if len(data) > _MAX_SIDECAR_BYTES:
        raise SampleRejected("sidecar too large", f"{len(data)} bytes")
    try:
        sidecar = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleRejected("broken JSON", str(error)) from error
    if not isinstance(sidecar, dict):
        raise SampleRejected("broken sidecar", "no object at the top")
    if sidecar.get("schema") != SCHEMA:
        raise SampleRejected("wrong schema version", f"{sidecar.get('schema')!r}, not {SCHEMA}")
    return sidecar


def _turn(entry: dict[str, Any], number: int) -> Turn:
    role = "assistant" if number % 2 else "user"
    if entry.get("role") != role:
        raise SampleRejected("role order", f"turn {number} is {entry.get('role')!r} where the {role}'s is due")
    return Turn(
        role=role,
        text=_field(entry, "text", str, default=""),
        speech_codes=_codes(entry),
        labels=_labels(entry, role),
        thinking=_field(entry, "thinking", str),
        speaker_embedding=_speaker_embedding(entry),
    )


def _labels(entry: dict[str, Any], role: str) -> dict[str, str]:
    labels = _field(entry, "labels", dict, default={})
    for name, label in labels.items():
        if name not in LABEL_SETS:
            raise SampleRejected("unknown label set", f"{name!r}; known: {', '.join(LABEL_SETS)}")
        known = REPLY_EMOTIONS if role == "assistant" and name == "emotion" else LABEL_SETS[name]
        if label not in known:
            raise SampleRejected("unknown label", f"{name} {label!r}; known: {', '.join(known)}")
    return labels


def _codes(entry: dict[str, Any]) -> Tensor | None:
    codes = _field(entry, "codes", list)
    if codes is None:
        return None
    if codes and (set(map(type, codes)) != {int} or min(codes) < 0 or max(codes) >= 2**31):
        raise SampleRejected("bad speech codes", "codes are integers from 0")
    return id_tensor(codes)


def _speaker_embedding(entry: dict[str, Any]) -> Tensor | None:
    values = _field(entry, "speaker_embedding", list)
    if values is None:
        return None
    if not values or not set(map(type, values)) <= {int, float}:
        raise SampleRejected("bad speaker embedding", "it is a list of numbers")
    embedding = torch.tensor(values, dtype=torch.float32)
    if not bool(embedding.isfinite().all()):
        raise SampleRejected("bad speaker embedding", "its values are finite")
    return embedding


def _audio_bytes(entry: dict[str, Any], members: Mapping[str, bytes]) -> bytes | None:
    name = _field(entry, "audio", str)
    if name is None:
        return None
    if name not in members:
        raise SampleRejected("missing member", f"audio {name!r}; the dialogue holds {', '.join(sorted(members))}")
    return members[name]


def _field(entry: dict[str, Any], name: str, kind: type | tuple[type, ...], *, default: Any = None) -> Any:
    """A field of the sidecar, `default` where it is absent or null, rejected where it has another type."""
    value = entry.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SampleRejected("broken sidecar", f"{name} is {type(value).__name__}")
    return value
