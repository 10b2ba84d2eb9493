"""`echat evaluate compare A B`: two runs on the items that both answered, paired.

How hard an item is cancels out in a pair, so that an interval of the difference is narrower than those of the two
scores, and says more than whether they overlap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lightning_echat.contracts import UserError
from lightning_echat.data.files import write_atomically
from lightning_echat.evaluation.answering import DIALOGUES, UNDERSTANDING
from lightning_echat.evaluation.bootstrap import bootstrap_interval, share_above_zero
from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.records import AnswerRecord, nan_as_none, read_records
from lightning_echat.evaluation.scores import ScoreKey, judges_of
from lightning_echat.evaluation.scoring import ANSWERS
from lightning_echat.tokens.paralinguistics import LABEL_SETS

Values = dict[ScoreKey, float]
"""Item -> what it scored."""


def compare(runs: list[Path], *, judge: str | None = None, out: Path | None = None, seed: int = 0) -> None:
    """Compare two runs: scores of replies by category, and what was heard, paired over common items.

    Args:
        runs: Two folders that echat evaluate wrote. Differences are the second minus the first.
        judge: Name of the judge, as score files and reports have it; the one that scored both, where only one did.
        out: Write the comparison as JSON too.
        seed: Of the bootstrap.
    """
    if len(runs) != 2:
        raise UserError(f"two runs are compared, not {len(runs)}: echat evaluate compare A B")
    comparison = compare_runs(runs[0], runs[1], judge=judge, seed=seed)
    _print_comparison(comparison)
    if out is not None:
        content = json.dumps(nan_as_none(comparison), indent=2, ensure_ascii=False, allow_nan=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content=(content + "\n").encode())


def compare_runs(first: Path, second: Path, *, judge: str | None = None, seed: int = 0) -> dict[str, Any]:
    """What `compare` prints: `replies` by category, `thinking` and `understanding` by figure.

    Each figure is {"items", "first", "second", "difference": [mean, low, high], "share_better"}; the last is the share
    of bootstrap resamples in which the second run is ahead.
    """
    paths = [_answers(run, DIALOGUES) for run in (first, second)]
    judge = judge or _common_judge(paths, (first, second))
    dialogues = [read_records(path, judge=judge) for path in paths]
    for run, records in zip((first, second), dialogues, strict=True):
        if any(record.judge != judge for record in records):
            raise UserError(f"{run}: not scored by {judge}; first: echat evaluate score {run}")
    comparison: dict[str, Any] = {
        "first": str(first),
        "second": str(second),
        "judge": judge,
        "replies": {
            name: _paired(*(_reply_scores(records, name) for records in dialogues), seed=seed) for name in CATEGORIES
        },
        "thinking": _perception(dialogues, seed=seed, thinking=True),
        "understanding": {},
    }
    for path in sorted((first / ANSWERS).glob(f"{UNDERSTANDING}*.jsonl")):
        other = second / ANSWERS / path.name
        if other.is_file():
            name = path.stem.removeprefix(UNDERSTANDING)
            records = [read_records(path), read_records(other)]
            comparison["understanding"][name] = _perception(records, seed=seed, thinking=False)
    return comparison


def _answers(run: Path, name: str) -> Path:
    path = run / ANSWERS / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{run} holds no {ANSWERS}/{name}.jsonl; give a folder that echat evaluate has finished")
    return path


def _common_judge(paths: Sequence[Path], runs: Sequence[Path]) -> str:
    common = [name for name in judges_of(paths[0]) if name in judges_of(paths[1])]
    if not common:
        raise UserError(f"no judge has scored both {runs[0]} and {runs[1]}; first: echat evaluate score RUN")
    if len(common) > 1:
        raise UserError(f"several judges scored both runs; give one by --judge: {', '.join(common)}")
    return common[0]


def _reply_scores(records: Iterable[AnswerRecord], category: str) -> Values:
    return {
        (record.item.set_name, record.item.key): record.score.by_category[category]
        for record in records
        if record.score is not None and category in record.score.by_category
    }


def _perception(runs: Sequence[Sequence[AnswerRecord]], *, seed: int, thinking: bool) -> dict[str, Any]:
    """Label by label whether it was heard, as shares; of thinking or of understanding tasks."""
    figures = {}
    for name in LABEL_SETS:
        values = [_hits(records, lambda record, name=name: _is_heard(record, name), thinking) for records in runs]
        if all(values):
            figures[name] = _paired(*values, seed=seed)
    return figures


def _hits(records: Iterable[AnswerRecord], judged: Callable[[AnswerRecord], bool | None], thinking: bool) -> Values:
    found = {
        (record.item.set_name, record.item.key): judged(record)
        for record in records
        if record.answer.thinks == thinking
    }
    return {key: float(hit) for key, hit in found.items() if hit is not None}


def _is_heard(record: AnswerRecord, label_set: str) -> bool | None:
    """Whether a label was named right, None where it was not asked or is not known."""
    if label_set not in record.answer.asked_labels or label_set not in record.item.labels:
        return None
    return record.answer.labels.get(label_set) == record.item.labels[label_set]


def _paired(first: Values, second: Values, *, seed: int) -> dict[str, Any]:
    common = [key for key in first if key in second]
    before = np.array([first[key] for key in common])
    after = np.array([second[key] for key in common])
    nan = float("nan")
    return {
        "items": len(common),
        "only_in_one": len(first.keys() ^ second.keys()),
        "first": float(before.mean()) if common else nan,
        "second": float(after.mean()) if common else nan,
        "difference": list(bootstrap_interval(after - before, seed=seed)),
        "share_better": share_above_zero(after - before, seed=seed),
    }


def _print_comparison(comparison: Mapping[str, Any]) -> None:
    console = Console()
    console.print(f"first: {comparison['first']}\nsecond: {comparison['second']}", highlight=False, soft_wrap=True)
    parts = {f"replies, by {comparison['judge']}": comparison["replies"]}
    if comparison["thinking"]:
        parts["labels in thinking"] = comparison["thinking"]
    parts |= {f"labels heard, {name}": found for name, found in comparison["understanding"].items()}
    for title, figures in parts.items():
        table = Table(
            "", "items", "first", "second", "second − first, 95 %", "ahead", title=title, title_justify="left"
        )
        for name, found in figures.items():
            scale = 1.0 if figures is comparison["replies"] else 100.0
            table.add_row(name, str(found["items"]), *_cells(found, scale))
        console.print(table)
    unlike = sum(found["only_in_one"] for found in comparison["replies"].values())
    if unlike:
        console.print(f"{unlike} scores have no partner in the other run and are left out", highlight=False)


def _cells(found: Mapping[str, Any], scale: float) -> list[str]:
    """Both figures, their difference, and how sure it is; what there is no data for says so."""
    if not found["items"]:
        return ["no data", "", "", ""]
    mean, low, high = (scale * value for value in found["difference"])
    figures = [f"{scale * found[name]:.1f}" for name in ("first", "second")]
    if found["items"] == 1:
        return [*figures, f"{mean:+.1f}", ""]
    return [*figures, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{100 * found['share_better']:.0f} %"]
