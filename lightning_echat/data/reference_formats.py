"""Raw, shard and combine data of the public implementation, read as if it stood in the project's own shards.

`read_unit` yields the rows of one unit of a description (reference_data.py). A row is converted when its members are
first looked at, so passing over it costs little, and what is wrong with it shows where every other sample is parsed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import soundfile

from lightning_echat.contracts import SampleRejected
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.reference_data import PAIR_MARK, UNIT_MARK, ReferenceData, is_file, load_description
from lightning_echat.data.reference_rows import MAIN_AUDIO, ReferenceFields, RowConverter, read_extra
from lightning_echat.data.reference_tags import LabelReader, ReferenceTask, read_task

_SIDECAR = "json"
_AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "wma")

TarReader = Callable[[str, SkipCounter], Iterator[tuple[str, bytes]]]
"""Path and counter -> names and bytes of the files in a tar, in order; damage is counted and ends it."""


class RowMembers(Mapping[str, bytes]):
    """The members of a row as a shard would hold them; made when first looked at.

    Looking at them raises `SampleRejected` where the row cannot be used.
    """

    def __init__(self, convert: Callable[[], dict[str, bytes]]) -> None:
        self._convert = convert
        self._members: dict[str, bytes] | None = None

    def __getitem__(self, name: str) -> bytes:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, bytes]:
        if self._members is None:
            self._members = self._convert()
        return self._members


@dataclass(slots=True, kw_only=True)
class ReferenceRow:
    """A row of a unit: its place there (lines of a list, samples of a tar, from 0), its key, its members."""

    key: str
    index: int
    members: RowMembers


def read_unit(unit: str, *, counter: SkipCounter, tar_members: TarReader) -> Iterator[ReferenceRow]:
    """The rows of a unit in order, sound or not. Lists are read line by line.

    Args:
        unit: From `list_units`.
        counter: Counts damage and unknown spellings.
        tar_members: How tars are read.
    """
    description, _, names = unit.partition(UNIT_MARK)
    reader = _UnitReader(load_description(Path(description)), unit, counter, tar_members)
    if reader.data.format == "raw":
        yield from reader.raw_rows(names)
    elif PAIR_MARK in names:
        yield from reader.combined_rows(*names.split(PAIR_MARK))
    else:
        yield from reader.shard_rows(names)


class _UnitReader:
    """One unit being read."""

    def __init__(self, data: ReferenceData, unit: str, counter: SkipCounter, tar_members: TarReader) -> None:
        self.data = data
        self._unit = unit
        self._counter = counter
        self._tar_members = tar_members
        self._converter = RowConverter(labels=LabelReader(extra=data.spellings), reply_emotion=data.reply_emotion)
        self._only = {read_task(tag) for tag in data.only}

    def raw_rows(self, path: str) -> Iterator[ReferenceRow]:
        """JSON lines, each with paths of its recordings."""
        for index, row in self._json_rows(path):
            yield from self._row(index, row, partial(self._files_of, row))

    def shard_rows(self, path: str) -> Iterator[ReferenceRow]:
        """A tar with everything in it."""
        for index, (key, group) in enumerate(self._groups(path)):
            yield from self._row(index, {"key": key}, partial(_tar_fields, {}, group), tag=group.get("task", b""))

    def combined_rows(self, rows_path: str, tar_path: str) -> Iterator[ReferenceRow]:
        """JSON lines joined to the recordings of a tar by key; in the same order, only one row is held at a time."""
        rows = self._json_rows(rows_path)
        waiting: dict[str, tuple[int, Any]] = {}
        for key, group in self._groups(tar_path):
            while key not in waiting and (entry := next(rows, None)) is not None:
                index, row = entry
                name = _key(row)
                if name is None or name in waiting:
                    reason = ("no key", "") if name is None else ("duplicate key", repr(name))
                    yield from self._row(index, row, partial(_reject, row, *reason))
                else:
                    waiting[name] = entry
            if key in waiting:
                index, row = waiting.pop(key)
                yield from self._row(index, row, partial(_tar_fields, row, group))
            else:
                self._counter.notice("audio without a row", shard=self._unit, key=key)
        for index, row in (*waiting.values(), *rows):
            reason = ("missing audio", f"{Path(tar_path).name} holds no {_key(row)}")
            yield from self._row(index, row, partial(_reject, row, *reason))

    def _json_rows(self, path: str) -> Iterator[tuple[int, Any]]:
        """Line numbers from 0 and what stands there: an object, or the error that it is."""
        try:
            with Path(path).open("rb") as lines:
                yield from ((index, _parse(line)) for index, line in enumerate(lines) if line.strip())
        except OSError as error:
            self._counter.notice("damaged shard", shard=self._unit, detail=str(error))

    def _groups(self, path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Neighbouring members of one key: what precedes the last dot of their names."""
        key, group = "", {}
        for name, data in self._tar_members(path, self._counter):
            prefix, _, suffix = name.removeprefix("./").rpartition(".")
            if not prefix:
                self._counter.notice("member without key", shard=self._unit, key=name)
                continue
            if group and prefix != key:
                yield key, group
                group = {}
            key = prefix
            if suffix in group:
                self._counter.notice("duplicate member", shard=self._unit, key=name)
            group.setdefault(suffix, data)
        if group:
            yield key, group

    def _row(
        self, index: int, row: Any, read: Callable[[], ReferenceFields], *, tag: str | bytes = b""
    ) -> Iterator[ReferenceRow]:
        """The row, unless its task is not asked for."""
        task = self._task(row, tag)
        if self._only and isinstance(task, ReferenceTask) and task not in self._only:
            return
        key = _as_stored(_key(row) or f"line-{index + 1}")
        yield ReferenceRow(key=key, index=index, members=RowMembers(partial(self._members, row, task, read, key)))

    def _task(self, row: Any, tag: str | bytes) -> ReferenceTask | SampleRejected:
        if isinstance(row, SampleRejected):
            return row
        text = row.get("task") or (tag.decode("utf-8", "replace") if isinstance(tag, bytes) else tag)
        if not (text := str(text).strip() or self.data.task):
            hint = 'add "task" to the row, or task: "<TRANSCRIBE>" or another tag for all rows without one'
            return SampleRejected("no task", f"{hint} to {self.data.path.name}")
        try:
            return read_task(text)
        except SampleRejected as error:
            return error

    def _members(
        self, row: Any, task: ReferenceTask | SampleRejected, read: Callable[[], ReferenceFields], key: str
    ) -> dict[str, bytes]:
        if isinstance(task, SampleRejected):
            raise task
        try:
            sidecar, members = self._converter.convert(read(), task)
        finally:
            for spelling in self._converter.labels.take_unknown():
                self._counter.notice(f"unknown {spelling}", shard=self._unit, key=key)
        return {_SIDECAR: json.dumps(sidecar).encode(), **members}

    def _files_of(self, row: dict[str, Any]) -> ReferenceFields:
        audio = {
            name: partial(self._recording, row, name)
            for name in row
            if name == MAIN_AUDIO or re.fullmatch(rf"{MAIN_AUDIO}_\d{{1,4}}", name)
        }
        return ReferenceFields(values=row, extra=read_extra(row.get("extra")), audio=audio)

    def _recording(self, row: dict[str, Any], name: str) -> bytes:
        """The bytes of a recording, or of the part that `start` and `end` name."""
        path = self.data.locate(str(row[name]))
        if not is_file(path):
            raise self.data.missing(str(row[name]))
        try:
            return _cut(path, row) if name == MAIN_AUDIO and "start" in row else path.read_bytes()
        except OSError as error:
            raise SampleRejected("missing audio", f"{path}: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any] | SampleRejected:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleRejected("broken JSON", str(error))
    return row if isinstance(row, dict) else SampleRejected("broken row", "no object on the line")


def _key(row: Any) -> str | None:
    key = row.get("key") if isinstance(row, dict) else None
    return str(key).strip() or None if key is not None else None


def _as_stored(key: str) -> str:
    """Keys of shards hold neither dots nor slashes; escaped like this, they stay different and can be read back."""
    return "".join(
        letter
        if letter.isprintable() and letter not in "./\\%"
        else "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))
        for letter in key
    )


def _reject(row: Any, reason: str, detail: str) -> ReferenceFields:
    raise row if isinstance(row, SampleRejected) else SampleRejected(reason, detail)


def _tar_fields(row: dict[str, Any], group: dict[str, bytes]) -> ReferenceFields:
    """Members of a tar as fields; where there is a row, its text and `extra` count and not the tar's."""
    audio = {name: data for name, data in group.items() if re.fullmatch(rf"{MAIN_AUDIO}_\d{{1,4}}", name)}
    if found := next((name for name in _AUDIO_SUFFIXES if name in group), None):
        audio[MAIN_AUDIO] = group[found]
    names = [name for name in group if name in ("txt", "speaker") or re.fullmatch(r"txt_\d{1,4}", name)]
    try:
        values = {name: group[name].decode("utf-8") for name in names if name not in row}
    except UnicodeDecodeError as error:
        raise SampleRejected("broken row", f"text is not UTF-8: {error}") from error
    if row:
        values = {**{name: value for name, value in values.items() if name != "txt"}, **row}
    extra = read_extra(row.get("extra") if row else group.get("extra"))
    return ReferenceFields(values=values, extra=extra, audio={n: partial(bytes, data) for n, data in audio.items()})


def _cut(path: Path, row: dict[str, Any]) -> bytes:
    """Seconds `start` to `end` of a recording as a WAV file, sample values unchanged."""
    start, end = row.get("start"), row.get("end")
    if not (isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end):
        raise SampleRejected("broken row", f"start {start!r} and end {end!r} are no span of seconds")
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(min(int(start * file.samplerate), file.frames))
            samples = file.read(int(end * file.samplerate) - int(start * file.samplerate), dtype="float32")
            rate = file.samplerate
    except (soundfile.SoundFileError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise SampleRejected("unreadable audio", f"{path}: {error}") from error
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()
