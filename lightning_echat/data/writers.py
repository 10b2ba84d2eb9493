"""Writes dialogues as the shards of docs/data_format.md, for the corpus that the quickstart makes and for any other.

The same dialogues give the same bytes: members carry no time, owner or machine. A shard is written under a temporary
name and renamed when it is whole, so that a shard that exists is a shard that is finished.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import soundfile
from numpy.typing import NDArray
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, Turn, UserError
from lightning_echat.data.files import TEMPORARY_SUFFIX
from lightning_echat.data.shard_index import write_index
from lightning_echat.data.tar_samples import SCHEMA
from lightning_echat.tokens.paralinguistics import REPLY_EMOTIONS, check_label

AudioFormat = Literal["wav", "flac"]

_LOUDEST = 1.0 + 1e-4


def check_audio_format(audio_format: str) -> None:
    """Raise UserError unless audio can be stored in this format."""
    if audio_format not in get_args(AudioFormat):
        raise UserError(f"unknown audio format {audio_format!r}; known: {', '.join(get_args(AudioFormat))}")


def to_int16(audio: Tensor) -> NDArray[np.int16]:
    """[samples] float in [-1, 1] -> int16; dividing by 32768 gives the float back.

    Raises:
        ValueError: The waveform is not one-dimensional, holds no samples or not-a-number, or leaves [-1, 1].
    """
    samples = audio.detach().cpu().float().numpy()
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"audio must be [samples] with at least one sample, not of shape {list(samples.shape)}")
    loudest = float(np.abs(samples).max())
    if not loudest <= _LOUDEST:
        raise ValueError(f"audio must lie in [-1, 1]; its loudest sample is {loudest:.3g}")
    return np.clip(np.round(samples * 32768.0), -32768, 32767).astype(np.int16)


def encode_audio(audio: Tensor, *, audio_format: AudioFormat) -> bytes:
    """[samples] float32 at `SAMPLE_RATE` -> the bytes of a 16-bit WAV or FLAC file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, to_int16(audio), SAMPLE_RATE, format=audio_format.upper(), subtype="PCM_16")
    return buffer.getvalue()


def check_turns(turns: list[Turn]) -> None:
    """Raise ValueError unless the turns can stand in a shard: alternating, the user first, with known labels."""
    if not turns:
        raise ValueError("a dialogue needs at least one turn")
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"turn {index} must be the {expected}'s, not the {turn.role}'s: roles alternate")
        if not turn.text and turn.audio is None:
            raise ValueError(f"turn {index} holds neither text nor audio")
        for label_set, label in turn.labels.items():
            if turn.role == "assistant" and label_set == "emotion":
                if label not in REPLY_EMOTIONS:
                    raise ValueError(f"unknown reply emotion {label!r}; known: {', '.join(REPLY_EMOTIONS)}")
            else:
                check_label(label_set, label)


def _describe_turn(turn: Turn, *, audio_name: str) -> dict[str, Any]:
    """The turn as it stands in the sidecar."""
    described: dict[str, Any] = {"role": turn.role}
    if turn.text:
        described["text"] = turn.text
    if turn.audio is not None:
        described |= {"audio": audio_name, "seconds": round(turn.audio.numel() / SAMPLE_RATE, 4)}
    if turn.labels:
        described["labels"] = turn.labels
    if turn.thinking is not None:
        described["thinking"] = turn.thinking
    if turn.speech_codes is not None:
        described["codes"] = turn.speech_codes.tolist()
    if turn.speaker_embedding is not None:
        described["speaker_embedding"] = turn.speaker_embedding.tolist()
    return described


class ShardFile:
    """One shard in the making, for a `with` statement: whole at its end, gone when an error leaves it.

    Args:
        path: The final name.
        audio_format: How audio is stored.
    """

    def __init__(self, path: Path, *, audio_format: AudioFormat = "wav") -> None:
        check_audio_format(audio_format)
        self.path = path
        self.samples = 0
        self._audio_format: AudioFormat = audio_format
        self._keys: set[str] = set()
        self._temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tar.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)

    def write(self, sample: DialogueSample) -> None:
        """Append a dialogue: the sidecar, then the audio of its turns.

        Raises:
            ValueError: The dialogue does not fit the format; nothing of it was written.
        """
        if not sample.key or "." in sample.key or "/" in sample.key:
            raise ValueError(f"key {sample.key!r} must be a name without dot and slash")
        if sample.key in self._keys:
            raise ValueError(f"key {sample.key!r} occurs twice in {self.path.name}")
        check_turns(sample.turns)
        sidecar: dict[str, Any] = {"schema": SCHEMA}
        sidecar |= {name: value for name in ("speaker", "voice_type") if (value := getattr(sample, name))}
        names = [f"{index}.{self._audio_format}" for index in range(len(sample.turns))]
        sidecar["turns"] = [
            _describe_turn(turn, audio_name=name) for turn, name in zip(sample.turns, names, strict=True)
        ]
        # Everything is encoded before anything is written: a bad turn leaves no half dialogue behind.
        clips = {
            name: encode_audio(turn.audio, audio_format=self._audio_format)
            for turn, name in zip(sample.turns, names, strict=True)
            if turn.audio is not None
        }
        add_member(self._tar, f"{sample.key}.json", json.dumps(sidecar, ensure_ascii=False).encode())
        for name, content in clips.items():
            add_member(self._tar, f"{sample.key}.{name}", content)
        self._keys.add(sample.key)
        self.samples += 1


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member that says nothing about time, user or machine."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


class ShardWriter:
    """Writes any number of dialogues as numbered shards of a folder and indexes them, for a `with` statement.

    An error leaves the shards that were finished before it and no index.

    Args:
        folder: Where `shard-000000.tar`, … go.
        audio_format: How audio is stored.
        dialogues_per_shard: Shards hold so many, the last one what is left.
    """

    def __init__(self, folder: Path, *, audio_format: AudioFormat = "wav", dialogues_per_shard: int = 100) -> None:
        if dialogues_per_shard < 1:
            raise UserError(f"dialogues_per_shard must be at least 1, not {dialogues_per_shard}")
        self.folder = folder
        self.samples = 0
        self._audio_format: AudioFormat = audio_format
        self._dialogues_per_shard = dialogues_per_shard
        self._shards = 0
        self._open: ShardFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open is not None:
            self._open.__exit__(kind, error, at)
            self._open = None
        if kind is None and self._shards:
            write_index(self.folder)

    def write(self, sample: DialogueSample) -> None:
        """Append a dialogue; raises ValueError, and writes nothing, when it does not fit the format."""
        if self._open is None:
            name = shard_name(self._shards)
            self._open = ShardFile(self.folder / name, audio_format=self._audio_format)
            self._shards += 1
        self._open.write(sample)
        self.samples += 1
        if self._open.samples == self._dialogues_per_shard:
            self._open.__exit__(None, None, None)
            self._open = None


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[DialogueSample], *, audio_format: AudioFormat = "wav") -> int:
    """Write one shard. Returns the number of dialogues in it."""
    with ShardFile(path, audio_format=audio_format) as shard:
        for sample in samples:
            shard.write(sample)
    return shard.samples
