"""Reads what an offline W&B run wrote, without W&B's server: the transaction log, its history and its tables.

The framing is LevelDB's log format with a plain CRC-32 (shared/research/wandb.md); it is private to wandb, so a new
wandb that changes it fails here first.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK = 32768
_HEADER = 7


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file; a torn tail, as a killed run leaves it, ends the reading."""
    data = path.read_bytes()
    assert struct.unpack("<4sHB", data[:_HEADER])[:2] == (b":W&B", 0xBEE1), f"{path} is no W&B log"
    position, part = _HEADER, b""
    while True:
        if (left := _BLOCK - position % _BLOCK) < _HEADER:
            position += left
            continue
        if len(data) < position + _HEADER:
            return
        crc, size, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        body = data[position + _HEADER : position + _HEADER + size]
        if (kind == 0 and size == 0) or len(body) < size:
            return
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == crc, f"{path}: checksum at {position}"
        position += _HEADER + size
        part = body if kind in (1, 2) else part + body
        if kind in (1, 4):
            record = pb.Record()  # type: ignore[attr-defined]  # generated at import
            record.ParseFromString(part)
            yield record


@dataclass(slots=True)
class OfflineRun:
    """What one offline run logged.

    Attributes:
        history: One dict per `log()` call, in order.
        config: The run's configuration.
        artifacts: Client id -> {path in the artifact: file on disk}.
    """

    history: list[dict[str, Any]]
    config: dict[str, Any]
    artifacts: dict[str, dict[str, Path]]

    def series(self, key: str) -> list[tuple[int, Any]]:
        """(`trainer/global_step`, value) of every row that holds the key."""
        return [(row["trainer/global_step"], row[key]) for row in self.history if key in row]

    def table(self, key: str) -> tuple[dict[str, Any], dict[str, Path]]:
        """The last table under a key as {"columns", "data"}, and the files that its media cells name."""
        reference = next(row[key]["artifact_path"] for row in reversed(self.history) if key in row)
        client, _, path = reference.removeprefix("wandb-client-artifact://").partition("/")
        files = self.artifacts[client]
        return json.loads(files[path].read_text(encoding="utf-8")), files


def read_run(folder: Path) -> OfflineRun:
    """The only offline run below a folder, once it is finished."""
    (path,) = pieces(folder)
    return read_piece(_finished_records(path))


def pieces(folder: Path) -> list[Path]:
    """Logs of the offline runs of a folder, oldest first; a run that was continued has several."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def read_piece(found: Iterable[Any]) -> OfflineRun:
    """What records say."""
    run = OfflineRun(history=[], config={}, artifacts={})
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "run":
            run.config |= _items(record.run.config.update)
        elif kind == "config":
            run.config |= _items(record.config.update)
        elif kind == "artifact":
            files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
            run.artifacts[record.artifact.client_id] = files
    return run


def _finished_records(path: Path, *, seconds: float = 30.0) -> list[Any]:
    """The records, exit included. `wandb.finish` returns before its service has written the last of them."""
    until = time.monotonic() + seconds
    while True:
        found = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < until, f"{path} has no exit record after {seconds:g} s"
        time.sleep(0.1)


def _items(items: Any) -> dict[str, Any]:
    """Key-value items; one with a nested key goes into a dict."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = values
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return values
