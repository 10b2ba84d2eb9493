"""`echat data verify`: read shards as training would, say what is in them, index them, and write clean copies."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, ParsedDialogue, parse_dialogue, with_audio
from lightning_echat.data.process_pool import count_cores, progress_bar, run_jobs
from lightning_echat.data.read_errors import KEPT, NOTICED, READ, SkipCounter
from lightning_echat.data.reference_data import is_reference
from lightning_echat.data.remote import LOCAL, READ_AGAIN, ShardAccess, is_url
from lightning_echat.data.repair import repair_shards
from lightning_echat.data.shard_index import (
    FOLDER_INDEX,
    SampleEntry,
    ShardIndex,
    describe_sample,
    file_hash,
    find_index,
    index_path,
    write_indices,
    write_shard_index,
)
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import StoredSample, is_compressed

_SECONDS_TOLERANCE = 0.05
"""Difference between a sidecar's duration and the audio's that is worth a word."""
_LENGTH_EDGES = (1, 2, 4, 8, 15, 30)
_BAR = 40
_SMALL = 200 * 10**6
"""Bytes that are read before other processes have started."""


@dataclass(slots=True, kw_only=True)
class ShardFindings:
    """What was found in one shard.

    Attributes:
        path: Its path or URL.
        entries: Every sample found, in order.
        counter: What was read, kept, skipped and noticed.
        defects: A line for each defect, with shard and key.
        speakers: Names.
        user_turns: Turns of users in usable samples.
    """

    path: str
    entries: list[SampleEntry] = field(default_factory=list)
    counter: SkipCounter = field(default_factory=SkipCounter)
    defects: list[str] = field(default_factory=list)
    speakers: set[str] = field(default_factory=set)
    user_turns: int = 0

    @property
    def usable(self) -> list[SampleEntry]:
        """The samples that training would take."""
        return [entry for entry in self.entries if not entry.defect]


class _DefectCounter(SkipCounter):
    """Counts, and lists each defect instead of logging the first."""

    def __init__(self, defects: list[str]) -> None:
        super().__init__()
        self._defects = defects

    def _count(self, key: str, shard: str, sample: str, detail: str) -> None:
        self.counts[key] += 1
        where = " ".join(part for part in (shard, sample) if part)
        self.examples.setdefault(key, where)
        if key == NOTICED + READ_AGAIN:
            return  # the network's defect, not the shard's
        self._defects.append(f"{where}: {key.partition('/')[2]}{f' ({detail})' if detail else ''}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    path: str
    max_seconds: float
    access: ShardAccess


def verify(
    shards: list[str],
    *,
    max_seconds: float = 30.0,
    workers: int | None = None,
    index: bool = True,
    repair: Path | None = None,
    access: ShardAccess | None = None,
) -> None:
    """Read every sample with all its audio; print totals, histograms, duplicates, and each defect with shard and key.

    Args:
        shards: Tar files, globs, list files, folders, or URLs.
        max_seconds: Longest clip that training would take.
        workers: Processes; by default one per core, or this one alone where there is little to read.
        index: Write an index beside each local shard, and index.json where a whole folder was read.
        repair: Folder for clean copies: what cannot be used and what occurs twice is left out, stated durations are
            put right, and every other byte stays.
        access: How shards behind a URL are reached.

    Raises:
        UserError: There are defects and no repair was asked for: how many samples would be skipped, and why.
    """
    access = access or LOCAL
    paths = expand_shards(shards, access=access)
    if repair is not None and (rows := next(filter(is_reference, paths), None)) is not None:
        raise UserError(f"{rows} holds rows of another format, which echat data pack makes clean shards of")
    workers = workers or _useful_workers(paths)
    found = check_shards(paths, max_seconds=max_seconds, workers=workers, access=access)
    for findings in found:
        _check_indices(findings)
    console = Console()
    print_report(found, console=console)
    if index:
        write_indices_of(found)
    if repair is not None:
        repaired = repair_shards(_to_keep(found), out=repair, workers=workers, access=access)
        kept, read = sum(repaired.values()), sum(len(findings.entries) for findings in found)
        console.print(f"{repair}: {kept} of {read} samples in {len(repaired)} shards", highlight=False, soft_wrap=True)
    elif any(findings.defects for findings in found):
        raise UserError(f"{total_counts(found).summary()}; --repair FOLDER writes clean copies")


def _useful_workers(paths: list[str]) -> int:
    local = [Path(path).stat().st_size for path in paths if not is_url(path) and Path(path).is_file()]
    return 1 if len(local) == len(paths) and sum(local) < _SMALL else count_cores()


def check_shards(
    paths: list[str], *, max_seconds: float = 30.0, workers: int = 1, access: ShardAccess = LOCAL
) -> list[ShardFindings]:
    """Read every sample of the shards, with a progress bar; costs about as much as decoding all audio."""
    jobs = [_Job(path=path, max_seconds=max_seconds, access=access) for path in paths]
    found: dict[str, ShardFindings] = {}
    with progress_bar("shards") as progress:
        bar = progress.add_task("verifying", total=len(jobs))
        for job, findings in run_jobs(check_shard, jobs, workers=workers):
            found[job.path] = findings
            progress.advance(bar)
    return [found[path] for path in paths]


def check_shard(job: _Job) -> ShardFindings:
    """Read every sample of one shard."""
    findings = ShardFindings(path=job.path)
    findings.counter = _DefectCounter(findings.defects)
    keys: set[str] = set()
    for stored in read_shard(ShardPart(path=job.path), counter=findings.counter, access=job.access):
        if stored.key in keys:
            findings.counter.notice("duplicate key", shard=job.path, key=stored.key)
        keys.add(stored.key)
        findings.entries.append(_check_sample(stored, findings, max_seconds=job.max_seconds))
    if not findings.entries:
        findings.counter.notice("empty shard", shard=job.path)
    return findings


def _check_sample(stored: StoredSample, findings: ShardFindings, *, max_seconds: float) -> SampleEntry:
    parsed = None
    try:
        parsed = parse_dialogue(stored)
        everything = range(len(parsed.sample.turns))
        sample = with_audio(parsed, turns=everything, max_seconds=max_seconds, counter=findings.counter)
    except SampleRejected as error:
        findings.counter.reject(error, shard=stored.shard, key=stored.key)
        return describe_sample(stored, parsed, seconds=parsed.seconds if parsed else (), defect=error.reason)
    findings.counter.keep()
    _check_members(stored, parsed, findings)
    _check_seconds(parsed, sample, findings)
    findings.speakers.add(sample.speaker)
    findings.user_turns += sum(turn.role == "user" for turn in sample.turns)
    return describe_sample(stored, parsed, seconds=[_seconds(turn.audio) for turn in sample.turns])


def _seconds(audio: Tensor | None) -> float | None:
    return None if audio is None else len(audio) / SAMPLE_RATE


def _check_members(stored: StoredSample, parsed: ParsedDialogue, findings: ShardFindings) -> None:
    used = sum(data is not None for data in parsed.audio) + 1
    # Items of a benchmark may bring their words in another voice too (docs/evaluation.md).
    used += json.loads(stored.members[SIDECAR]).get("neutral_audio") in stored.members
    if len(stored.members) > used:
        names = sorted(name for name in stored.members if name != SIDECAR)
        findings.counter.notice(
            "member that no turn names", shard=stored.shard, key=stored.key, detail=f"among {', '.join(names)}"
        )


def _check_seconds(parsed: ParsedDialogue, sample: DialogueSample, findings: ShardFindings) -> None:
    for place, (turn, claimed) in enumerate(zip(sample.turns, parsed.seconds, strict=True)):
        found = _seconds(turn.audio)
        # Written so that a claimed NaN counts as different.
        if found is not None and claimed is not None and not abs(found - claimed) <= _SECONDS_TOLERANCE:
            detail = f"turn {place} has {found:.2f} s, its sidecar says {claimed:.2f}"
            findings.counter.notice("duration differs", shard=sample.shard, key=sample.key, detail=detail)


def _check_indices(findings: ShardFindings) -> None:
    """Compare the shard with what its own index and its folder's say, where there are any."""
    if is_url(findings.path):
        return
    path = Path(findings.path)
    own = find_index(findings.path, counter=findings.counter)
    if own is not None and own.sha256 != file_hash(path):
        findings.counter.notice("index out of date", shard=str(path), detail="checksum differs")
    folder_index = path.parent / FOLDER_INDEX
    if not folder_index.is_file() or not path.is_file():
        return
    try:
        entries = json.loads(folder_index.read_text(encoding="utf-8"))["shards"]
        sizes = {entry["file"]: entry["bytes"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        findings.counter.notice("unreadable index", shard=str(folder_index), detail=repr(error))
        return
    if sizes.get(path.name) != path.stat().st_size:
        findings.counter.notice("index out of date", shard=str(path), detail=f"{FOLDER_INDEX} has another size or none")


def write_indices_of(found: list[ShardFindings]) -> None:
    """Write what was found beside each local shard, and the sums into each folder that was read as a whole."""
    by_folder: dict[Path, list[ShardIndex]] = {}
    for findings in found:
        path = Path(findings.path)
        if is_url(findings.path) or not path.is_file() or is_compressed(path):
            continue
        index = ShardIndex(file=path.name, bytes=path.stat().st_size, sha256=file_hash(path), samples=findings.entries)
        by_folder.setdefault(path.parent, []).append(index)
    for folder, indices in by_folder.items():
        try:
            if {index.file for index in indices} == {path.name for path in folder.glob("*.tar")}:
                write_indices(folder, indices)
            else:
                for index in indices:
                    write_shard_index(index, path=Path(index_path(str(folder / index.file))))
        except OSError as error:
            raise UserError(f"cannot write an index into {folder}: {error.strerror}; pass --index false") from error


def total_counts(found: list[ShardFindings]) -> SkipCounter:
    """The counts of all shards."""
    total = SkipCounter()
    for findings in found:
        total.merge(findings.counter)
    return total


def duplicates(found: list[ShardFindings]) -> dict[tuple[str, int], tuple[str, str]]:
    """(shard, ordinal) of each usable sample whose content came before -> shard and key of where."""
    first: dict[str, tuple[str, str]] = {}
    again: dict[tuple[str, int], tuple[str, str]] = {}
    for findings in found:
        for ordinal, entry in enumerate(findings.entries):
            if entry.defect:
                continue
            if entry.sha256 in first:
                again[findings.path, ordinal] = first[entry.sha256]
            else:
                first[entry.sha256] = (findings.path, entry.key)
    return again


def _to_keep(found: list[ShardFindings]) -> dict[str, list[int]]:
    """Shard -> places of the samples of a clean copy: usable, the first of their key, the first of their content."""
    again = duplicates(found)
    keep: dict[str, list[int]] = {}
    for findings in found:
        keys: set[str] = set()
        for ordinal, entry in enumerate(findings.entries):
            if not entry.defect and entry.key not in keys and (findings.path, ordinal) not in again:
                keys.add(entry.key)
                keep.setdefault(findings.path, []).append(ordinal)
    return keep


def print_report(found: list[ShardFindings], *, console: Console) -> None:
    """Totals, the histograms of labels and lengths, duplicates, and the defects."""
    counts, usable = total_counts(found).counts, [entry for findings in found for entry in findings.usable]
    hours = {role: sum(entry.seconds.get(role, 0.0) for entry in usable) / 3600 for role in ("user", "assistant")}
    speakers = set().union(*(findings.speakers for findings in found))
    console.print(
        f"{len(found)} shards, {counts[READ]} samples, {counts[KEPT]} usable, {len(speakers)} speakers, "
        f"{hours['user']:.2f} h of queries, {hours['assistant']:.2f} h of replies, "
        f"{sum(entry.codes for entry in usable)} speech codes",
        highlight=False,
        soft_wrap=True,
    )
    if again := counts[NOTICED + READ_AGAIN]:
        console.print(f"{again} reads failed and were repeated", highlight=False)
    _print_labels(usable, sum(findings.user_turns for findings in found), console)
    _print_lengths(usable, console)
    entries = {findings.path: findings.entries for findings in found}
    for (path, ordinal), (shard, key) in duplicates(found).items():
        entry = entries[path][ordinal]
        console.print(
            f"{path} {entry.key}: same content as {shard} {key}", markup=False, highlight=False, soft_wrap=True
        )
    for findings in found:
        for defect in findings.defects:
            console.print(defect, markup=False, highlight=False, soft_wrap=True)


def _print_labels(usable: list[SampleEntry], user_turns: int, console: Console) -> None:
    histograms: dict[str, Counter[str]] = {}
    for entry in usable:
        for name, labels in entry.labels.items():
            histograms.setdefault(name, Counter()).update(labels)
    table = Table("label set", "label", "user turns", "share")
    for name, histogram in histograms.items():
        for label, count in histogram.most_common():
            table.add_row(name, label, str(count), f"{count / user_turns:.1%}")
    if table.row_count:
        console.print(table)


def _print_lengths(usable: list[SampleEntry], console: Console) -> None:
    spoken = [entry.seconds["user"] for entry in usable if entry.seconds.get("user")]
    if not spoken:
        return
    bins = Counter(sum(length >= edge for edge in _LENGTH_EDGES) for length in spoken)
    table = Table("seconds of queries", "samples", "share", "")
    for number in range(min(bins), max(bins) + 1):
        low, high = (0, *_LENGTH_EDGES)[number], (*_LENGTH_EDGES, None)[number]
        share = bins[number] / len(spoken)
        span = f"{low} to {high}" if high is not None else f"{low} and more"
        table.add_row(span, str(bins[number]), f"{share:.1%}", "█" * round(share * _BAR))
    console.print(table)
