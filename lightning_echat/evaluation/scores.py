"""Scores on disk, apart from the answers: one file for each judge and each file of answers.

    evaluation/scores/JUDGE/NAME.jsonl

Answers are never rewritten, several judges may score the same ones, and scoring again replaces that judge's file only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_echat.contracts import UserError
from lightning_echat.data.files import write_atomically
from lightning_echat.evaluation.judging import JudgeScore, as_row, from_row

SCHEMA = 1

ScoreKey = tuple[str, str]
"""Evaluation set and key of an item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFile:
    """What one judge says about one file of answers.

    Attributes:
        judge: Its name.
        made_by: What made the answers that it judged.
        scores: Item -> score, None where the judge's answer could not be read.
    """

    judge: str
    made_by: str
    scores: Mapping[ScoreKey, JudgeScore | None]


def file_name(name: str) -> str:
    """A name as part of a path: everything but letters, digits, -, _ and inner dots becomes _."""
    return re.sub(r"[^\w.-]", "_", name).strip(".") or "_"


def judge_folder(folder: Path, judge: str) -> Path:
    """Where a judge's scores of the answers in `folder` stand."""
    return folder / "scores" / file_name(judge)


def write_scores(answers: Path, scores: ScoreFile) -> Path:
    """Write the scores of the answers in the file `answers`. Returns the path."""
    path = judge_folder(answers.parent, scores.judge) / answers.name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"schema": SCHEMA, "judge": scores.judge, "made_by": scores.made_by}
    rows: list[Mapping[str, Any]] = [header]
    for (set_name, key), score in scores.scores.items():
        rows.append({"set": set_name, "key": key, "score": None if score is None else as_row(score)})
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_atomically(path, content=lines.encode())
    return path


def read_scores(answers: Path, *, judge: str | None = None) -> ScoreFile | None:
    """The scores of a file of answers by `judge`, or by the one that scored last; None where there are none.

    Raises:
        UserError: The file cannot be read.
    """
    if judge is not None:
        path = judge_folder(answers.parent, judge) / answers.name
        return _read(path) if path.is_file() else None
    paths = sorted((answers.parent / "scores").glob("*/" + answers.name), key=lambda path: path.stat().st_mtime_ns)
    return _read(paths[-1]) if paths else None


def judges_of(answers: Path) -> list[str]:
    """Names of all judges that scored a file of answers."""
    return [_read(path).judge for path in sorted((answers.parent / "scores").glob("*/" + answers.name))]


def _read(path: Path) -> ScoreFile:
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    try:
        head = json.loads(header)
        if head["schema"] != SCHEMA:
            raise UserError(f"{path}: scores of schema {head['schema']}; this version reads schema {SCHEMA}")
        rows = [json.loads(line) for line in lines]
        scores = {(row["set"], row["key"]): None if row["score"] is None else from_row(row["score"]) for row in rows}
        return ScoreFile(judge=head["judge"], made_by=head["made_by"], scores=scores)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of scores ({error}); score again: echat evaluate score") from error


def score_keys(items: Sequence[Any]) -> list[ScoreKey]:
    """The keys of records, in their order."""
    return [(record.item.set_name, record.item.key) for record in items]
