"""`echat data pack`: anybody's dialogues and audio files as the shards that training reads.

A manifest is JSON lines in the form of the sidecar of docs/data_format.md, except that `audio` is the path of a file,
relative to the manifest; or it is the description of data in a format of the public implementation. Every row is either
packed or counted and listed with its place and the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lightning_echat.contracts import DialogueSample, SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, decode_dialogue
from lightning_echat.data.files import write_atomically
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.reference_data import is_reference
from lightning_echat.data.reference_tags import read_task
from lightning_echat.data.shard_index import FOLDER_INDEX, INDEX_SUFFIX
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import SCHEMA, StoredSample
from lightning_echat.data.writers import AudioFormat, ShardWriter

_SKIPPED_ROWS = "skipped.jsonl"
_SHOWN = 10


@dataclass(slots=True, kw_only=True)
class _Row:
    """A row to be packed.

    Attributes:
        name: How reports call it.
        place: Where it stands, as skipped.jsonl says it.
        stored: Makes it what a shard would hold; `SampleRejected` where it cannot.
    """

    name: str
    place: dict[str, Any]
    stored: Callable[[], StoredSample]


def pack(
    manifest: Path,
    out: Path,
    *,
    audio_format: AudioFormat = "flac",
    dialogues_per_shard: int = 500,
    max_seconds: float = 60.0,
    overwrite: bool = False,
) -> None:
    """Turn dialogues and audio files, or data in a format of the public implementation, into shards.

    Args:
        manifest: JSON lines, a dialogue each: "turns" as docs/data_format.md describes, "audio" a path relative to the
            manifest; optional "key", "speaker" and "voice_type". Audio may have any sample rate and format that
            libsndfile reads. Or NAME.reference.yaml, which describes raw, shard or combine data of the public
            OSUM-EChat implementation (keys: format, data, root, task, … in docs/data_format.md).
        out: Folder for the shards and their index; what was skipped goes to skipped.jsonl in it.
        audio_format: flac or wav, 16 kHz mono either way.
        dialogues_per_shard: Dialogues in a shard.
        max_seconds: A turn with more audio is skipped.
        overwrite: Replace the shards of an earlier run.

    Raises:
        UserError: The manifest cannot be read, nothing in it can be used, or `out` holds shards already.
    """
    if not manifest.is_file():
        raise UserError(f"manifest {manifest} does not exist")
    counter, skipped, keys, tags = SkipCounter(), [], set[str](), Counter[str]()
    read = partial(_reference_rows, counter=counter) if is_reference(str(manifest)) else _manifest_rows
    with Progress(console=Console(stderr=True)) as progress:
        rows = read(manifest, progress=progress)
        _clear(out, overwrite=overwrite)
        with ShardWriter(out, audio_format=audio_format, dialogues_per_shard=dialogues_per_shard) as writer:
            for row in rows:
                try:
                    stored = row.stored()
                    if stored.key in keys:
                        raise SampleRejected("duplicate key", repr(stored.key))
                    _write(writer, decode_dialogue(stored, max_seconds=max_seconds))
                except SampleRejected as error:
                    counter.skip(error.reason, shard=manifest.name, key=row.name, detail=str(error))
                    skipped.append({**row.place, "reason": error.reason, "detail": str(error), "name": row.name})
                    continue
                counter.keep()
                keys.add(stored.key)
                tags[json.loads(stored.members[SIDECAR]).get("task", "")] += 1
    if not writer.samples:
        why = f"{_reasons(counter)}; the first: {skipped[0]['detail']}" if skipped else "it is empty"
        raise UserError(f"{manifest} holds nothing that can be packed: {why}")
    _report(out, counter=counter, skipped=skipped)
    _report_tasks(tags)


def _manifest_rows(manifest: Path, *, progress: Progress) -> Iterator[_Row]:
    """Lines that are not blank, numbered from 1."""
    with progress.open(manifest, "rb", description="packing") as file:
        for number, line in enumerate(file, start=1):
            if text := line.decode("utf-8", errors="replace").strip():
                read = partial(_read_line, text, number=number, manifest=manifest)
                yield _Row(name=f"line {number}", place={"line": number}, stored=read)


def _reference_rows(manifest: Path, *, progress: Progress, counter: SkipCounter) -> Iterator[_Row]:
    """Rows of all files of a description."""
    for unit in progress.track(expand_shards([str(manifest)]), description="packing"):
        for stored in read_shard(ShardPart(path=unit), counter=counter):
            place = {"shard": stored.shard, "row": stored.ordinal + 1, "key": stored.key}
            yield _Row(name=stored.key, place=place, stored=lambda stored=stored: stored)


def _read_line(line: str, *, number: int, manifest: Path) -> StoredSample:
    """One line of a manifest, with the audio that it names; `SampleRejected` where it cannot be used."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SampleRejected("broken JSON", str(error)) from error
    if not isinstance(row, dict):
        raise SampleRejected("broken sidecar", "no object at the top")
    key = str(row.get("key") or f"{manifest.stem.replace('.', '-')}-{number:08d}")
    if "." in key:
        raise SampleRejected("bad key", f"{key!r} holds a dot")
    sidecar, members = _embed_audio(row, folder=manifest.parent)
    members[SIDECAR] = json.dumps(sidecar).encode()
    return StoredSample(key=key, shard=manifest.name, ordinal=number, members=members)


def _embed_audio(row: dict[str, Any], *, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The row as a sidecar, with paths of audio replaced by names of members, and these members."""
    members: dict[str, bytes] = {}
    turns = row.get("turns")
    sidecar = {"schema": SCHEMA, **row, "turns": turns}
    if not isinstance(turns, list):
        raise SampleRejected("no turns", "a dialogue is {'turns': [...]}")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("audio") is None:
            continue
        path = folder / str(turn["audio"])
        try:
            members[f"{index}.audio"] = path.read_bytes()
        except OSError as error:
            raise SampleRejected("missing audio", f"{path}: {error.strerror}") from error
        turns[index] = {**turn, "audio": f"{index}.audio"}
    return sidecar, members


def _write(writer: ShardWriter, sample: DialogueSample) -> None:
    """Append the dialogue; what the format cannot hold is a rejected row like any other."""
    for turn in sample.turns:
        # Resampling overshoots by a little where the original was close to full scale.
        if turn.audio is not None and (loudest := float(turn.audio.abs().max())) > 1.0:
            turn.audio = turn.audio / loudest
    try:
        writer.write(sample)
    except ValueError as error:
        raise SampleRejected("empty turn" if "neither" in str(error) else "unwritable", str(error)) from error


def _clear(out: Path, *, overwrite: bool) -> None:
    """Make sure that shards of two runs never stand side by side."""
    present = [*out.glob("*.tar"), *out.glob(f"*{INDEX_SUFFIX}"), *out.glob(FOLDER_INDEX)] if out.is_dir() else []
    if present and not overwrite:
        raise UserError(f"{out} holds {present[0].name} already: choose another folder or pass --overwrite true")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder")
    for path in present:
        path.unlink()


def _reasons(counter: SkipCounter) -> str:
    """Reasons and how often, in one line."""
    return ", ".join(f"{count} {reason}" for reason, count in counter.skipped.items())


def _report(out: Path, *, counter: SkipCounter, skipped: list[dict[str, Any]]) -> None:
    """Say what was packed and what was not, and why; the whole list goes to a file."""
    console = Console()
    index = json.loads((out / FOLDER_INDEX).read_text())
    line = f"{out}: {index['samples']} dialogues, {index['seconds'] / 3600:.2f} h in {len(index['shards'])} shards"
    console.print(f"{line}; {len(skipped)} skipped" + (f": {_reasons(counter)}" if skipped else ""), soft_wrap=True)
    for row in skipped[:_SHOWN]:
        console.print(f"  {row['name']}: {row['detail']}", soft_wrap=True, markup=False)
    for what, count in counter.noticed.items():
        console.print(f"noticed {count} {what}", soft_wrap=True, markup=False)
    listing = out / _SKIPPED_ROWS
    if skipped:
        rows = [{key: value for key, value in row.items() if key != "name"} for row in skipped]
        write_atomically(listing, content="".join(json.dumps(row) + "\n" for row in rows).encode())
        if len(skipped) > _SHOWN:
            console.print(f"  all {len(skipped)} are in {listing}", soft_wrap=True)
    else:
        listing.unlink(missing_ok=True)


def _report_tasks(tags: Counter[str]) -> None:
    """Which tasks of the project rows with a task tag are for: what a source in YAML may name."""
    for tag, count in tags.most_common():
        if tag:
            text = f"{count} rows of {tag} serve the task {read_task(tag).serves}"
            Console().print(text, soft_wrap=True, markup=False, highlight=False)
