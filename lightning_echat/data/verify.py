"""`echat data verify`: read shards as training would, and say what is in them and what would be skipped."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_echat.contracts import SAMPLE_RATE, DialogueSample, SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, ParsedDialogue, parse_dialogue, with_audio
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import FOLDER_INDEX
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.tokens.paralinguistics import LABEL_SETS

_SECONDS_TOLERANCE = 0.05
"""Difference between a sidecar's duration and the audio's that is worth a word."""


@dataclass(slots=True, kw_only=True)
class ShardReport:
    """What was found in a list of shards.

    Attributes:
        counter: Dialogues read, kept and skipped, and what was noticed besides.
        defects: One line for each defect, with shard and key.
        shards: How many were read.
        seconds: Audio per role.
        turns: Turns per role.
        codes: Speech codes.
        labels: Label set -> label -> user turns that carry it.
        speakers: Different names.
    """

    counter: SkipCounter = field(default_factory=SkipCounter)
    defects: list[str] = field(default_factory=list)
    shards: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    turns: Counter[str] = field(default_factory=Counter)
    codes: int = 0
    labels: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in LABEL_SETS})
    speakers: set[str] = field(default_factory=set)

    @property
    def sound(self) -> bool:
        """Whether nothing is to be mended."""
        return not self.defects


class _DefectCounter(SkipCounter):
    """Counts, and lists each defect instead of logging the first."""

    def __init__(self, defects: list[str]) -> None:
        super().__init__()
        self._defects = defects

    def _count(self, key: str, shard: str, sample: str, detail: str) -> None:
        self.counts[key] += 1
        where = " ".join(part for part in (shard, sample) if part)
        self.examples.setdefault(key, where)
        self._defects.append(f"{where}: {key.partition('/')[2]}{f' ({detail})' if detail else ''}")


def verify(shards: list[str], *, max_seconds: float = 30.0) -> None:
    """Read every dialogue with all its audio and print totals, labels, and each defect with its shard and key.

    Args:
        shards: Tar files, globs, list files, or folders with index.json.
        max_seconds: Longest clip that training would take.

    Raises:
        UserError: There are defects: how many samples would be skipped, and why.
    """
    paths = expand_shards(shards)
    report = check_shards(paths, max_seconds=max_seconds)
    check_indices(paths, report)
    print_report(report, console=Console())
    if not report.sound:
        raise UserError(report.counter.summary())


def check_shards(paths: list[str], *, max_seconds: float = 30.0) -> ShardReport:
    """Read every dialogue of the shards. Costs about as much as decoding all audio."""
    report = ShardReport()
    report.counter = _DefectCounter(report.defects)
    for path in paths:
        report.shards += 1
        keys: set[str] = set()
        for stored in read_shard(ShardPart(path=path), counter=report.counter):
            if stored.key in keys:
                report.counter.notice("duplicate key", shard=path, key=stored.key)
            keys.add(stored.key)
            _check_dialogue(stored, report, max_seconds=max_seconds)
    return report


def check_indices(paths: list[str], report: ShardReport) -> None:
    """Compare each folder's index, where there is one, with the sizes of the shards read."""
    for folder in dict.fromkeys(Path(path).parent for path in paths):
        index = folder / FOLDER_INDEX
        if not index.is_file():
            continue
        try:
            sizes = {entry["file"]: entry["bytes"] for entry in json.loads(index.read_text(encoding="utf-8"))["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            report.counter.notice("unreadable index", shard=str(index), detail=repr(error))
            continue
        for path in (Path(path) for path in paths if Path(path).parent == folder):
            if sizes.get(path.name) != path.stat().st_size:
                report.counter.notice("index out of date", shard=str(path), detail="size differs or entry is missing")


def _check_dialogue(stored: StoredSample, report: ShardReport, *, max_seconds: float) -> None:
    try:
        parsed = parse_dialogue(stored)
        everything = range(len(parsed.sample.turns))
        sample = with_audio(parsed, turns=everything, max_seconds=max_seconds, counter=report.counter)
    except SampleRejected as error:
        report.counter.reject(error, shard=stored.shard, key=stored.key)
        return
    report.counter.keep()
    _check_members(stored, parsed, report)
    _check_seconds(parsed, sample, report)
    report.speakers.add(sample.speaker)
    for turn in sample.turns:
        report.turns[turn.role] += 1
        report.seconds[turn.role] += _seconds(turn.audio.numel()) if turn.audio is not None else 0.0
        report.codes += len(turn.speech_codes) if turn.speech_codes is not None else 0
        if turn.role == "user":
            for name, label in turn.labels.items():
                report.labels[name][label] += 1


def _check_members(stored: StoredSample, parsed: ParsedDialogue, report: ShardReport) -> None:
    used = sum(data is not None for data in parsed.audio) + 1
    if len(stored.members) > used:
        names = sorted(name for name in stored.members if name != SIDECAR)
        report.counter.notice(
            "member that no turn names", shard=stored.shard, key=stored.key, detail=f"among {', '.join(names)}"
        )


def _check_seconds(parsed: ParsedDialogue, sample: DialogueSample, report: ShardReport) -> None:
    for place, (turn, claimed) in enumerate(zip(sample.turns, parsed.seconds, strict=True)):
        if turn.audio is None or claimed is None:
            continue
        found = _seconds(turn.audio.numel())
        # Written so that a claimed NaN counts as different.
        if not abs(found - claimed) <= _SECONDS_TOLERANCE:
            detail = f"turn {place} has {found:.2f} s, its sidecar says {claimed:.2f}"
            report.counter.notice("duration differs", shard=sample.shard, key=sample.key, detail=detail)


def _seconds(samples: int) -> float:
    return samples / SAMPLE_RATE


def print_report(report: ShardReport, *, console: Console) -> None:
    """Totals, the label histogram, and the defects."""
    counts = report.counter.counts
    hours = {role: seconds / 3600 for role, seconds in report.seconds.items()}
    console.print(
        f"{report.shards} shards, {counts['read']} samples, {counts['kept']} usable, "
        f"{len(report.speakers)} speakers, {hours.get('user', 0.0):.2f} h of queries, "
        f"{hours.get('assistant', 0.0):.2f} h of replies, {report.codes} speech codes",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("label set", "label", "user turns", "share")
    for name, histogram in report.labels.items():
        for label, count in histogram.most_common():
            table.add_row(name, label, str(count), f"{count / report.turns['user']:.1%}")
    if table.row_count:
        console.print(table)
    for defect in report.defects:
        console.print(defect, markup=False, highlight=False, soft_wrap=True)
