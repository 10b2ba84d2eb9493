"""Raw, shard and combine data of the public implementation, read as if it stood in the project's own shards.

`read_unit` yields the rows of one unit of a description (reference_data.py). A row is converted when its members are
first looked at, so passing over it costs little, and what is wrong with it shows where every other sample is parsed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
_NUMBERED_AUDIO = re.compile(rf"{MAIN_AUDIO}_\d{{1,4}}")
_TEXT_MEMBER = re.compile(r"txt|speaker|txt_\d{1,4}")
_AUDIO_SUFFIXES = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "wma")

_Line = dict[str, Any] | SampleRejected
"""A line of a list: its object, or why it is none."""
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
    """A row of a unit: key, place from 0 (the line of a raw list, else in the order read), members."""

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
        # Rows come in the order of the tar; their places ascend all the same, as a reader's cursor wants it.
        for place, row in enumerate(reader.combined_rows(*names.split(PAIR_MARK))):
            yield replace(row, index=place)
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
            if isinstance(row, SampleRejected):
                yield from self._rejected(index, row, row)
            else:
                yield from self._row(index, row, partial(self._listed_fields, row))

    def shard_rows(self, path: str) -> Iterator[ReferenceRow]:
        """A tar with everything in it."""
        for index, (key, group) in enumerate(self._groups(path)):
            yield from self._row(index, {"key": key}, partial(_tar_fields, group), tag=group.get("task"))

    def combined_rows(self, rows_path: str, tar_path: str) -> Iterator[ReferenceRow]:
        """JSON lines joined to the recordings of a tar by key; in the same order, only one row is held at a time."""
        rows = self._json_rows(rows_path)
        waiting: dict[str, tuple[int, dict[str, Any]]] = {}
        for key, group in self._groups(tar_path):
            while key not in waiting and (entry := next(rows, None)) is not None:
                index, row = entry
                name = _key(row)
                if isinstance(row, SampleRejected) or name is None:
                    yield from self._rejected(index, row, SampleRejected("no key"))
                elif name in waiting:
                    yield from self._rejected(index, row, SampleRejected("duplicate key", repr(name)))
                else:
                    waiting[name] = (index, row)
            if key in waiting:
                index, row = waiting.pop(key)
                yield from self._row(index, row, partial(_joined_fields, row, group), example=group.get("task"))
            else:
                self._counter.notice("audio without a row", shard=self._unit, key=key)
        for index, row in (*waiting.values(), *rows):
            detail = f"{Path(tar_path).name} holds no {_key(row)}"
            yield from self._rejected(index, row, SampleRejected("missing audio", detail))

    def _json_rows(self, path: str) -> Iterator[tuple[int, _Line]]:
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

    def _rejected(self, index: int, row: _Line, reason: SampleRejected) -> Iterator[ReferenceRow]:
        """The row as one that cannot be used, whatever its task. Where it is an error itself, that is the reason."""
        error = row if isinstance(row, SampleRejected) else reason
        yield ReferenceRow(key=_stored_key(index, row), index=index, members=RowMembers(partial(_raise, error)))

    def _row(
        self,
        index: int,
        row: dict[str, Any],
        read: Callable[[], ReferenceFields],
        *,
        tag: bytes | None = None,
        example: bytes | None = None,
    ) -> Iterator[ReferenceRow]:
        """The row, unless its task is not asked for. `tag` is its task where the row does not say it."""
        task = self._task(row, tag, example=example)
        if self._only and isinstance(task, ReferenceTask) and task not in self._only:
            return
        key = _stored_key(index, row)
        yield ReferenceRow(key=key, index=index, members=RowMembers(partial(self._members, task, read, key)))

    def _task(self, row: dict[str, Any], tag: bytes | None, *, example: bytes | None) -> ReferenceTask | SampleRejected:
        text = str(row.get("task") or _decoded(tag)).strip() or self.data.task
        if not text:
            likely = _decoded(example).strip() or "<TRANSCRIBE>"
            hint = f'give the row a task, or add task: "{likely}", or what is right, to {self.data.path.name}'
            return SampleRejected("no task", hint)
        try:
            return read_task(text)
        except SampleRejected as error:
            return error

    def _members(
        self, task: ReferenceTask | SampleRejected, read: Callable[[], ReferenceFields], key: str
    ) -> dict[str, bytes]:
        if isinstance(task, SampleRejected):
            raise task
        try:
            sidecar, members = self._converter.convert(read(), task)
        finally:
            for spelling in self._converter.labels.take_unknown():
                self._counter.notice(f"unknown {spelling}", shard=self._unit, key=key)
        return {_SIDECAR: json.dumps(sidecar).encode(), **members}

    def _listed_fields(self, row: dict[str, Any]) -> ReferenceFields:
        audio = {
            name: partial(self._recording, row, name)
            for name in row
            if name == MAIN_AUDIO or _NUMBERED_AUDIO.fullmatch(name)
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


def _parse(line: bytes) -> _Line:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleRejected("broken JSON", str(error))
    return row if isinstance(row, dict) else SampleRejected("broken row", "no object on the line")


def _raise(error: SampleRejected) -> dict[str, bytes]:
    raise error


def _decoded(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "replace")


def _key(row: _Line) -> str | None:
    key = row.get("key") if isinstance(row, dict) else None
    return str(key).strip() or None if key is not None else None


def _stored_key(index: int, row: _Line) -> str:
    """A row's key. Those of shards hold neither dots nor slashes; escaped like this, they stay different."""
    return "".join(
        letter
        if letter.isprintable() and letter not in "./\\%"
        else "".join(f"%{byte:02X}" for byte in letter.encode("utf-8", "surrogatepass"))
        for letter in _key(row) or f"line-{index + 1}"
    )


def _tar_fields(group: dict[str, bytes]) -> ReferenceFields:
    """Members of a tar as fields."""
    audio = {name: partial(bytes, data) for name, data in group.items() if _NUMBERED_AUDIO.fullmatch(name)}
    if found := next((name for name in _AUDIO_SUFFIXES if name in group), None):
        audio[MAIN_AUDIO] = partial(bytes, group[found])
    try:
        values = {name: data.decode("utf-8") for name, data in group.items() if _TEXT_MEMBER.fullmatch(name)}
    except UnicodeDecodeError as error:
        raise SampleRejected("broken row", f"text is not UTF-8: {error}") from error
    return ReferenceFields(values=values, extra=read_extra(group.get("extra")), audio=audio)


def _joined_fields(row: dict[str, Any], group: dict[str, bytes]) -> ReferenceFields:
    """The recordings and earlier turns of a tar, everything else of the row: the tar's own text may be an older one."""
    heard = _tar_fields({name: data for name, data in group.items() if name not in ("txt", "extra")})
    return ReferenceFields(values={**heard.values, **row}, extra=read_extra(row.get("extra")), audio=heard.audio)


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
