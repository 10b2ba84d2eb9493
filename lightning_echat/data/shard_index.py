"""The index beside a shard: where each sample begins, and what is in it.

`SHARD.index.json` holds what is known of the samples of one shard, and the `index.json` of a folder the sums over its
shards; both are written here and nowhere else. A shard reads without either. An index that no longer fits its shard is
told by the size of the shard, and by the keys at the places that it names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_echat.contracts import SampleRejected, UserError
from lightning_echat.data.decoding import ParsedDialogue, parse_dialogue
from lightning_echat.data.files import write_atomically, write_json
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import LOCAL, ShardAccess, is_url, read_url
from lightning_echat.data.tar_samples import SCHEMA, StoredSample, samples_in

FOLDER_INDEX = "index.json"
INDEX_SUFFIX = ".index.json"
_STALE = "index out of date"


@dataclass(frozen=True, kw_only=True)
class SampleEntry:
    """What the index says of one sample.

    Attributes:
        key: Its name.
        offset, size: Bytes of the tar from its first header to the end of its last member.
        sha256: Of its members, whatever its key; the same content has the same. Empty where they cannot be made of a
            row of another format.
        seconds: Audio of user and assistant turns, as their sidecar says.
        characters: Letters of all turns' texts.
        codes: Speech codes of all turns.
        labels: Label set -> labels of the user turns that carry it.
        defect: Why a reader would skip the sample; empty where it would not, or where nobody looked.
    """

    key: str
    offset: int
    size: int
    sha256: str
    seconds: dict[str, float] = field(default_factory=dict)
    characters: int = 0
    codes: int = 0
    labels: dict[str, list[str]] = field(default_factory=dict)
    defect: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What is known of one shard.

    Attributes:
        file: Its name.
        bytes, sha256: Of the whole file.
        samples: In order; an entry's place is the sample's ordinal.
    """

    file: str
    bytes: int
    sha256: str
    samples: list[SampleEntry]

    @property
    def seconds(self) -> float:
        """Audio of all turns."""
        return sum(sum(sample.seconds.values()) for sample in self.samples)


def index_path(shard: str) -> str:
    """Where the index of a shard stands: beside it."""
    name, query, rest = shard.partition("?") if is_url(shard) else (shard, "", "")
    return f"{name}{INDEX_SUFFIX}{query}{rest}"


def describe_sample(
    stored: StoredSample, parsed: ParsedDialogue | None, *, seconds: Sequence[float | None] = (), defect: str = ""
) -> SampleEntry:
    """The entry of a sample.

    Args:
        stored: As read from the tar.
        parsed: Its content, None where it cannot be read.
        seconds: Audio of each turn.
        defect: Why it cannot be used, if so.
    """
    turns = parsed.sample.turns if parsed is not None else []
    labels: dict[str, list[str]] = {}
    by_role: dict[str, float] = defaultdict(float)
    for turn, length in zip(turns, seconds, strict=False):
        by_role[turn.role] += length or 0.0
    for turn in turns:
        for name, label in turn.labels.items() if turn.role == "user" else ():
            labels.setdefault(name, []).append(label)
    return SampleEntry(
        key=stored.key,
        offset=stored.offset,
        size=stored.size,
        sha256=content_hash(stored),
        seconds={role: round(total, 4) for role, total in sorted(by_role.items()) if total},
        characters=sum(len(turn.text) for turn in turns),
        codes=sum(len(turn.speech_codes) for turn in turns if turn.speech_codes is not None),
        labels=dict(sorted(labels.items())),
        defect=defect,
    )


def content_hash(stored: StoredSample) -> str:
    """sha256 over names and bytes of the members, in order of name; empty where a row cannot be made members."""
    try:
        members = sorted(stored.members.items())
    except SampleRejected:  # rows of the reference's formats are converted only now
        return ""
    digest = hashlib.sha256()
    for name, data in members:
        digest.update(f"{name}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def index_shard(path: Path) -> ShardIndex:
    """Describe a shard that a writer has just finished. Audio is not decoded; `echat data verify` does that.

    Raises:
        UserError: It is no shard of dialogues, or is damaged.
    """
    counter = SkipCounter()
    with path.open("rb") as file:
        samples = [_describe(stored) for stored in samples_in(file, shard=str(path), counter=counter)]
    if not samples or "damaged shard" in counter.noticed:
        raise UserError(f"{path} is not a shard of dialogues: {counter.summary()}")
    return ShardIndex(file=path.name, bytes=path.stat().st_size, sha256=file_hash(path), samples=samples)


def _describe(stored: StoredSample) -> SampleEntry:
    try:
        parsed = parse_dialogue(stored)
    except SampleRejected as error:
        return describe_sample(stored, None, defect=error.reason)
    return describe_sample(stored, parsed, seconds=parsed.seconds)


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard_index(index: ShardIndex, *, path: Path) -> None:
    """Write a shard's index: a line a sample, so that it can be looked through."""
    head = json.dumps({"schema": SCHEMA, "file": index.file, "bytes": index.bytes, "sha256": index.sha256})
    lines = ",\n".join(json.dumps(_without_empty(asdict(sample)), ensure_ascii=False) for sample in index.samples)
    text = f'{head[:-1]}, "samples": [\n{lines}\n]}}\n'
    write_atomically(path, content=text.encode("utf-8", "surrogateescape"))


def _without_empty(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value or name == "offset"}


def parse_shard_index(text: bytes) -> ShardIndex:
    """The index in a file.

    Raises:
        ValueError: It is none, or of another version.
    """
    try:
        content = json.loads(text)
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, not {SCHEMA}")
        samples = [SampleEntry(**entry) for entry in content["samples"]]
        return ShardIndex(file=content["file"], bytes=content["bytes"], sha256=content["sha256"], samples=samples)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no shard index: {error!r}") from error


def find_index(shard: str, *, counter: SkipCounter, access: ShardAccess = LOCAL) -> ShardIndex | None:
    """The index beside a shard, None where there is none that fits; one that does not is counted.

    Of a shard behind a URL the size is not asked for: keys that differ show an index out of date when it is used.
    """
    try:
        if is_url(shard):
            return _remote_index(index_path(shard), access)
        path = Path(index_path(shard))
        stat = path.stat()
        index = _local_index(str(path), stat.st_mtime_ns, stat.st_size)
        size = Path(shard).stat().st_size
    except (FileNotFoundError, PermissionError):
        return None
    except ValueError as error:
        counter.notice("unreadable index", shard=index_path(shard), detail=str(error))
        return None
    if size != index.bytes:
        counter.notice(_STALE, shard=shard, detail=f"it has {size} bytes, its index says {index.bytes}")
        return None
    return index


def reject_index(shard: str, *, key: str, found: str, counter: SkipCounter) -> None:
    """Count an index that named a place at which another sample stands."""
    counter.notice(_STALE, shard=shard, key=key, detail=f"{found or 'nothing'} stands at its place")


@lru_cache(maxsize=64)
def _local_index(path: str, _modified: int, _size: int) -> ShardIndex:
    return parse_shard_index(Path(path).read_bytes())


@lru_cache(maxsize=64)
def _remote_index(url: str, access: ShardAccess) -> ShardIndex:
    return parse_shard_index(read_url(url, counter=SkipCounter(), access=access))


def write_index(folder: Path) -> dict[str, Any]:
    """Write the index of every shard of a folder, and `index.json` with their sums; returns the latter.

    Raises:
        UserError: The folder holds no shard, or one that cannot be read.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder} holds no shard (*.tar)")
    return write_indices(folder, [index_shard(path) for path in paths])


def write_indices(folder: Path, indices: Sequence[ShardIndex]) -> dict[str, Any]:
    """Write the given indices of all shards of a folder, and `index.json` with their sums; returns the latter."""
    for index in indices:
        write_shard_index(index, path=folder / (index.file + INDEX_SUFFIX))
    content = sum_up(indices)
    write_json(folder / FOLDER_INDEX, content=content)
    return content


def sum_up(indices: Iterable[ShardIndex]) -> dict[str, Any]:
    """The content of a folder's `index.json`. Labels are counted over user turns: what there is to hear."""
    labels: dict[str, Counter[str]] = {}
    shards: list[dict[str, Any]] = []
    for index in indices:
        for sample in index.samples:
            for name, found in sample.labels.items():
                labels.setdefault(name, Counter()).update(found)
        entry = {"file": index.file, "samples": len(index.samples), "seconds": round(index.seconds, 3)}
        shards.append({**entry, "bytes": index.bytes, "sha256": index.sha256})
    return {
        "schema": SCHEMA,
        "shards": shards,
        "samples": sum(shard["samples"] for shard in shards),
        "seconds": round(sum(shard["seconds"] for shard in shards), 3),
        "labels": {name: dict(sorted(labels[name].items())) for name in sorted(labels)},
    }
