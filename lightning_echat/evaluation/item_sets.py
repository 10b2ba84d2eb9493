"""Item sets: the queries of a benchmark as data, JSON lines with audio files or shards (docs/evaluation.md).

Both come out as the same thing: the item, and the dialogue that poses it with its audio still encoded. An item that
cannot be used is counted by reason; a set of which nothing can be used, or too little, is an error of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_echat.command_errors import nearest
from lightning_echat.contracts import SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, ParsedDialogue, parse_dialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import SCHEMA, StoredSample
from lightning_echat.evaluation.items import CATEGORIES, EvaluationItem, categories_of, present_cues

LANGUAGES = ("en", "zh")

_SIDECAR_FIELDS = ("category", "categories", "speaker", "voice_type", "source", "language", "extra")
_ITEM_FIELDS = frozenset(
    {*_SIDECAR_FIELDS, "schema", "key", "audio", "neutral_audio"}
    | {"transcript", "labels", "reply", "reply_emotion", "turns"}
)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A named set of items.

    Attributes:
        name: How reports call it.
        shards: Patterns of shards, as for training, or files of JSON lines (NAME.jsonl).
        max_items: Use only so many, from the beginning; 0 for all.
    """

    name: str
    shards: list[str]
    max_items: int = 0


@dataclass(slots=True, kw_only=True)
class PosedItem:
    """An item and the dialogue that poses it.

    Attributes:
        item: What is asked, without the task, which is not the set's to decide.
        parsed: The dialogue up to the query, or to the reference reply where there is one; audio is encoded bytes.
        neutral_audio: The same words in a neutral voice, encoded; None where the set brings none.
    """

    item: EvaluationItem
    parsed: ParsedDialogue
    neutral_audio: bytes | None = None


def read_item_set(entry: EvaluationSet, *, counter: SkipCounter) -> Iterator[PosedItem]:
    """The usable items of a set in order; those that are not are counted.

    Raises:
        UserError: A file is missing, or no item can be used.
    """
    items = _items(entry, counter)
    yielded = 0
    for posed in islice(items, entry.max_items) if entry.max_items else items:
        yielded += 1
        yield posed
    if not yielded:
        why = counter.summary() if counter.skipped else "it is empty"
        raise UserError(f"evaluation set {entry.name!r} holds no usable item: {why}")


def set_files(entry: EvaluationSet) -> list[str]:
    """The files of a set, in order."""
    files: list[str] = []
    for pattern in entry.shards:
        if pattern.endswith(".jsonl"):
            if not Path(pattern).is_file():
                near = nearest(Path(pattern).name, [path.name for path in Path(pattern).parent.glob("*.jsonl")])
                raise UserError(f"evaluation set {entry.name!r}: no file {pattern}{near}")
            files.append(pattern)
        else:
            files += expand_shards([pattern])
    return files


def _items(entry: EvaluationSet, counter: SkipCounter) -> Iterator[PosedItem]:
    keys: set[str] = set()
    for file in set_files(entry):
        read = _json_lines(Path(file), counter) if file.endswith(".jsonl") else _shard(file, counter)
        for stored in read:
            try:
                posed = pose(stored, set_name=entry.name)
                if posed.item.key in keys:
                    raise SampleRejected("duplicate key", repr(posed.item.key))
            except SampleRejected as error:
                counter.reject(error, shard=stored.shard, key=stored.key)
                counter.check(max_share=0.05)
                continue
            keys.add(posed.item.key)
            counter.keep()
            yield posed


def _shard(path: str, counter: SkipCounter) -> Iterator[StoredSample]:
    yield from read_shard(ShardPart(path=path), counter=counter)


def pose(stored: StoredSample, *, set_name: str) -> PosedItem:
    """The item that a stored sample poses.

    Raises:
        SampleRejected: It breaks a rule of the format.
    """
    parsed = parse_dialogue(stored, source=set_name)
    sidecar = json.loads(stored.members[SIDECAR])
    users = [place for place, turn in enumerate(parsed.sample.turns) if turn.role == "user"]
    query, last = parsed.sample.turns[users[-1]], parsed.sample.turns[-1]
    reply = last if last.role == "assistant" else None
    item = EvaluationItem(
        key=stored.key,
        set_name=set_name,
        task="",
        transcript=query.text,
        categories=_categories(sidecar, query.labels),
        labels=dict(query.labels),
        reply=reply.text if reply else "",
        reply_emotion=reply.labels.get("emotion", "") if reply else "",
        speaker=parsed.sample.speaker,
        voice_type=parsed.sample.voice_type,
        source=_text(sidecar, "source"),
        language=_language(sidecar, query.text),
        extra=_extra(sidecar),
    )
    return PosedItem(item=item, parsed=parsed, neutral_audio=_neutral_audio(sidecar, stored))


def _categories(sidecar: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """The categories that the item names, else those of its labels. A named one must have a cue to be judged by."""
    named = sidecar.get("categories", sidecar.get("category"))
    if named is None:
        return categories_of(labels)
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not named:
        raise SampleRejected("broken category", f"{named!r} is no category and no list of them")
    cues = present_cues(labels)
    for name in named:
        if name not in CATEGORIES:
            raise SampleRejected("unknown category", f"{name!r}; known: {', '.join(CATEGORIES)}")
        if len(cues) < 2 if name == "multi" else name not in cues:
            raise SampleRejected("category without its cue", f"{name} with labels {labels}")
    return [name for name in CATEGORIES if name in named]


def _language(sidecar: dict[str, Any], text: str) -> str:
    """The language that the item names, else zh for a text with Chinese characters."""
    named = _text(sidecar, "language")
    if named and named not in LANGUAGES:
        raise SampleRejected("unknown language", f"{named!r}; known: {', '.join(LANGUAGES)}")
    return named or ("zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en")


def _neutral_audio(sidecar: dict[str, Any], stored: StoredSample) -> bytes | None:
    name = _text(sidecar, "neutral_audio")
    if not name:
        return None
    if name not in stored.members:
        raise SampleRejected("missing member", f"neutral_audio {name!r}")
    return stored.members[name]


def _extra(sidecar: dict[str, Any]) -> dict[str, str]:
    extra = sidecar.get("extra", {})
    if not isinstance(extra, dict):
        raise SampleRejected("broken sidecar", f"extra is {type(extra).__name__}")
    return {str(name): str(value) for name, value in extra.items()}


def _text(sidecar: dict[str, Any], name: str) -> str:
    value = sidecar.get(name, "")
    if not isinstance(value, str):
        raise SampleRejected("broken sidecar", f"{name} is {type(value).__name__}")
    return value


def _json_lines(path: Path, counter: SkipCounter) -> Iterator[StoredSample]:
    """The lines of a file as stored samples; audio paths are relative to the file and never leave its folder."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield stored_row(_object(line), folder=path.parent, shard=path.name, number=number)
            except SampleRejected as error:
                counter.reject(error, shard=str(path), key=f"line {number}")
                counter.check(max_share=0.05)


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleRejected("broken JSON", str(error)) from error
    if not isinstance(row, dict):
        raise SampleRejected("broken JSON", "the line holds no object")
    return row


def stored_row(row: dict[str, Any], *, folder: Path, shard: str, number: int) -> StoredSample:
    """One line of an item set, with the audio that it names, as a shard would hold it.

    Args:
        row: The line: `turns` as in a sidecar, or the short form with `audio`, `transcript`, `labels`, `reply`.
        folder: What paths of audio are relative to.
        shard: How reports call the file.
        number: The line's, from 1.

    Raises:
        SampleRejected: The row cannot be used.
    """
    if unknown := sorted(set(row) - _ITEM_FIELDS):
        raise SampleRejected("unknown field", f"{unknown[0]!r}{nearest(unknown[0], _ITEM_FIELDS)}")
    key = str(row.get("key") or f"{Path(shard).stem.replace('.', '-')}-{number:06d}")
    turns = row.get("turns")
    if turns is None:
        turns = _short_form(row)
    if not isinstance(turns, list):
        raise SampleRejected("no turns", "turns is no list")
    members: dict[str, bytes] = {}
    written = []
    for place, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("audio") is not None:
            members[f"{place}.audio"] = _bytes_of(turn["audio"], folder)
            turn = {**turn, "audio": f"{place}.audio"}
        written.append(turn)
    sidecar = {name: row[name] for name in _SIDECAR_FIELDS if row.get(name) is not None}
    if row.get("neutral_audio") is not None:
        members["neutral.audio"] = _bytes_of(row["neutral_audio"], folder)
        sidecar["neutral_audio"] = "neutral.audio"
    members[SIDECAR] = json.dumps({"schema": SCHEMA, **sidecar, "turns": written}).encode()
    return StoredSample(key=key, shard=shard, ordinal=number, members=members)


def _short_form(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One query and, where there is one, its reference reply."""
    query = {"role": "user", "text": row.get("transcript"), "audio": row.get("audio"), "labels": row.get("labels")}
    if not row.get("reply"):
        return [query]
    emotion = {"emotion": row["reply_emotion"]} if row.get("reply_emotion") else {}
    return [query, {"role": "assistant", "text": row["reply"], "labels": emotion}]


def _bytes_of(name: Any, folder: Path) -> bytes:
    """The audio file of that name below `folder`."""
    if not isinstance(name, str):
        raise SampleRejected("broken audio path", f"{name!r}")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise SampleRejected("audio outside the set", f"{name!r} leaves the folder of the file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleRejected("missing audio", f"{name}: {error.strerror}") from error


def with_audio_of(posed: PosedItem, audio: bytes | None) -> ParsedDialogue:
    """The dialogue with other audio for its query."""
    place = max(i for i, turn in enumerate(posed.parsed.sample.turns) if turn.role == "user")
    clips = list(posed.parsed.audio)
    clips[place] = audio
    return replace(posed.parsed, audio=clips)


def query_audio_of(posed: PosedItem) -> bytes | None:
    """The encoded audio of the query."""
    return posed.parsed.audio[max(i for i, turn in enumerate(posed.parsed.sample.turns) if turn.role == "user")]
