"""What a judge of replies is, whatever stands behind it, and how YAML and the command line name one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jsonargparse import ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

from lightning_echat.command_errors import ParseProblem, RaisesProblems, explain_parse_error, nearest
from lightning_echat.contracts import UserError

JUDGES: dict[str, str] = {
    "rubric": "lightning_echat.evaluation.rubric.RubricJudge",
    "llm": "lightning_echat.evaluation.llm_judge.LLMJudge",
}
"""Short name -> class path. Any other class is named by its path."""

UNPARSED = "unparsed"
"""Why a reply has no score: the judge's answer could not be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedReply:
    """What a judge is shown of one answer.

    Attributes:
        key: Names the item, for records.
        transcript: The words of the query.
        labels: Label set -> label of the query.
        categories: Where the reply is scored.
        reply: The words of the reply, without its thinking.
        reply_audio: The wav file of the reply, None where none is stored.
    """

    key: str
    transcript: str
    labels: Mapping[str, str]
    categories: Sequence[str]
    reply: str
    reply_audio: Path | None = None


@dataclass(slots=True, kw_only=True)
class JudgeScore:
    """How well one reply answers the voice it was given.

    Attributes:
        total: 0 to 100 over all cues of the query, NaN where the query carries none.
        by_category: Category -> 0 to 100, for the categories that the query belongs to.
        per_dimension: Cue, or dimension of the judge's rubric -> 0 to 100.
        verdicts: Cue -> what the judge decided about it, in one word.
        phrases: The wording that the verdicts rest on.
        on_topic: Whether the reply answers the words of the query, None where the judge does not say.
    """

    total: float
    by_category: dict[str, float]
    per_dimension: dict[str, float]
    verdicts: dict[str, str] = field(default_factory=dict)
    phrases: list[str] = field(default_factory=list)
    on_topic: bool | None = None


class Judge(Protocol):
    """Scores replies. YAML and the command line name one by a name of `JUDGES` or by its class path."""

    @property
    def name(self) -> str:
        """Written beside every score; changes whenever the same reply may score differently."""
        ...

    def score_all(self, replies: Sequence[JudgedReply], *, folder: Path) -> list[JudgeScore | None]:
        """A score for each reply, None where the judge answered and its answer could not be read.

        Args:
            replies: What is to be scored.
            folder: Where the judge may keep a record of its own; the same from run to run.

        Raises:
            UserError: The judge cannot finish (no server, budget spent); what it has done so far is kept.
        """
        ...


def make_judge(name: str, arguments: Mapping[str, Any] | None = None) -> Judge:
    """The judge of a name of `JUDGES` or of a class path, built with `arguments`.

    Raises:
        UserError: There is no such judge, or its arguments do not fit; one line with the nearest valid choice.
    """
    return construct(name, arguments, known=JUDGES, what="judge", members=("name", "score_all"))


def construct(
    name: str, arguments: Mapping[str, Any] | None, *, known: Mapping[str, str], what: str, members: Sequence[str]
) -> Any:
    """A plug-in by short name or class path; its arguments are checked against the types of its constructor."""
    path = known.get(name, name)
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise UserError(f"no {what} {name!r}; known: {', '.join(known)}, or the path of a class{nearest(name, known)}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{what} {name!r}: {error}; known: {', '.join(known)}, or the path of a class") from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        raise UserError(f"{what} {name!r}: no class {class_name!r} in {module_name}{nearest(class_name, dir(module))}")
    parser = _Parser(prog=what)
    keys = {str(key).partition(".")[0] for key in parser.add_class_arguments(cls, nested_key=None) or ()}
    if unknown := [str(key) for key in arguments or {} if str(key) not in keys]:
        raise UserError(f"{what} {name!r}: unknown key {unknown[0]!r}{nearest(unknown[0], keys)}")
    try:
        values = parser.parse_object(dict(arguments or {}))
    except ParseProblem as problem:
        line = explain_parse_error(str(problem), known_keys=keys, files=[])
        raise UserError(f"{what} {name!r}: {line}") from problem
    made = cls(**dict(parser.instantiate(values).items()))
    if missing := [member for member in members if not hasattr(made, member)]:
        raise UserError(f"{what} {name!r} has no {missing[0]!r}; see docs/recipes.md for what a {what} is")
    return made


class _Parser(RaisesProblems, ArgumentParser):
    """Reads the arguments of a plug-in."""


def as_row(score: JudgeScore) -> dict[str, Any]:
    """The score as JSON holds it."""
    row = dataclasses.asdict(score)
    row["total"] = None if math.isnan(score.total) else score.total
    return row


def from_row(row: Mapping[str, Any]) -> JudgeScore:
    """The score that `as_row` wrote."""
    return JudgeScore(**{**row, "total": math.nan if row["total"] is None else row["total"]})
