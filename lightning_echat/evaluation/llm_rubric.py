"""Rubrics of a judge that is a language model: a YAML file in, prompts out, and its answers read back strictly."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.command_errors import nearest
from lightning_echat.contracts import UserError

LLM_RUBRICS = Path(__file__).parent / "llm_rubrics"
"""Where the rubrics that come with the package stand."""

DEFAULT_LLM_RUBRIC = "echat_judge_v1"

_PLACES = frozenset({"low", "high", "dimensions", "transcript", "labels", "reply", "heard", "reply_emotion", "schema"})
_ANSWER = re.compile(r"\{.*\}", flags=re.DOTALL)
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", flags=re.DOTALL)
"""What reasoning models behind servers that do not cut it out write before their answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One thing that is scored.

    Attributes:
        name: Key of its score.
        asks: The question.
        anchors: Score -> what it stands for.
        needs_voice: Asked only where the emotion of the reply's voice was heard.
    """

    name: str
    asks: str
    anchors: Mapping[int, str]
    needs_voice: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMRubric:
    """A rubric as its file holds it; see `llm_rubrics/echat_judge_v1.yaml` for the meaning of each part."""

    name: str
    version: int
    low: int
    high: int
    dimensions: tuple[Dimension, ...]
    system: str
    user: str
    heard: str
    output_schema: Mapping[str, Any]

    @property
    def identifier(self) -> str:
        """Name and version, as it stands beside every score."""
        return f"{self.name}_v{self.version}"

    def asked(self, *, with_voice: bool) -> tuple[Dimension, ...]:
        """The dimensions that are scored."""
        return tuple(dimension for dimension in self.dimensions if with_voice or not dimension.needs_voice)

    def schema(self, *, with_voice: bool) -> dict[str, Any]:
        """The schema of an answer, without the dimensions that are not asked."""
        schema = copy.deepcopy(dict(self.output_schema))
        scores = schema["properties"]["scores"]
        names = [dimension.name for dimension in self.asked(with_voice=with_voice)]
        scores["required"] = names
        scores["properties"] = {name: scores["properties"][name] for name in names}
        return schema

    def messages(
        self, transcript: str, *, labels: Mapping[str, str], reply: str, reply_emotion: str | None, with_voice: bool
    ) -> list[dict[str, str]]:
        """The prompt about one reply.

        Args:
            transcript: The words of the query.
            labels: Label set -> label of the query.
            reply: The words of the reply.
            reply_emotion: What was heard in the reply's audio; None reads "nothing could be heard".
            with_voice: Whether the judge is told that at all.
        """
        heard = ""
        if with_voice:
            said = _json(reply_emotion) if reply_emotion is not None else "nothing could be heard"
            heard = _fill(self.heard, {"reply_emotion": said})
        values = {
            "low": str(self.low),
            "high": str(self.high),
            "dimensions": "\n".join(_describe(dimension) for dimension in self.asked(with_voice=with_voice)),
            "transcript": _json(transcript),
            "labels": _json(dict(labels)),
            "reply": _json(reply),
            "heard": heard,
            "schema": _json(self.schema(with_voice=with_voice)),
        }
        return [
            {"role": "system", "content": _fill(self.system, values)},
            {"role": "user", "content": _fill(self.user, values)},
        ]

    def read(self, answer: str, *, with_voice: bool) -> dict[str, float] | None:
        """Dimension -> score of an answer; None unless every dimension has a number on the scale."""
        found = _ANSWER.search(_THOUGHT.sub("", answer))
        try:
            scores = json.loads(found[0])["scores"] if found else None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if not isinstance(scores, dict):
            return None
        names = [dimension.name for dimension in self.asked(with_voice=with_voice)]
        if set(scores) != set(names) or not all(self._is_score(scores[name]) for name in names):
            return None
        return {name: float(scores[name]) for name in names}

    def _is_score(self, value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high


def load_llm_rubric(rubric: str | Path = DEFAULT_LLM_RUBRIC) -> LLMRubric:
    """Read a rubric: the name of one that comes with the package, or the path of a YAML file.

    Raises:
        UserError: It is not there or malformed.
    """
    shipped = {path.stem: path for path in LLM_RUBRICS.glob("*.yaml")}
    path = shipped.get(str(rubric), Path(rubric))
    if not path.is_file():
        known = f"give a YAML file or one of: {', '.join(sorted(shipped))}"
        raise UserError(f"no rubric {str(rubric)!r} for a language model; {known}{nearest(str(rubric), shipped)}")
    try:
        return _rubric_from(yaml.safe_load(path.read_text(encoding="utf-8")))
    except KeyError as error:
        raise UserError(f"rubric {path}: {error} is missing") from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"rubric {path}: {' '.join(str(error).split())}") from error


def _rubric_from(content: Any) -> LLMRubric:
    dimensions = tuple(_dimension_from(entry) for entry in content["dimensions"])
    rubric = LLMRubric(
        name=str(content["name"]),
        version=int(content["version"]),
        low=int(content["scale"]["low"]),
        high=int(content["scale"]["high"]),
        dimensions=dimensions,
        system=str(content["system"]),
        user=str(content["user"]),
        heard=str(content.get("heard", "")),
        output_schema=content["output_schema"],
    )
    _check(rubric)
    return rubric


def _dimension_from(entry: Mapping[str, Any]) -> Dimension:
    needs = entry.get("needs")
    if needs not in (None, "reply_emotion"):
        raise ValueError(f"dimension {entry['name']}: needs is {needs!r}; known: reply_emotion")
    anchors = {int(score): str(text) for score, text in entry["anchors"].items()}
    return Dimension(
        name=str(entry["name"]), asks=str(entry["asks"]), anchors=anchors, needs_voice=needs == "reply_emotion"
    )


def _check(rubric: LLMRubric) -> None:
    """Raise ValueError for a rubric that cannot be asked."""
    names = [dimension.name for dimension in rubric.dimensions]
    if len(set(names)) < len(names) or not rubric.asked(with_voice=False):
        raise ValueError("dimensions must have names of their own, and one must not need the reply's voice")
    if not rubric.low < rubric.high:
        raise ValueError(f"scale runs from {rubric.low} to {rubric.high}")
    scored = rubric.output_schema["properties"]["scores"]["properties"]
    if set(scored) != set(names):
        raise ValueError(f"output_schema scores {sorted(scored)} but the dimensions are {sorted(names)}")
    for text in (rubric.system, rubric.user, rubric.heard):
        if unknown := sorted(set(re.findall(r"\{(\w+)\}", text)) - _PLACES):
            raise ValueError(f"{{{unknown[0]}}} stands for nothing; known: {', '.join(sorted(_PLACES))}")
    for place in ("transcript", "labels", "reply"):
        if f"{{{place}}}" not in rubric.user:
            raise ValueError(f"user shows no {{{place}}}")


def _describe(dimension: Dimension) -> str:
    anchors = "; ".join(f"{score}: {text}" for score, text in sorted(dimension.anchors.items()))
    return f"- {dimension.name}: {dimension.asks} {anchors}"


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Fill in the places. In one go, so that braces inside what was filled in stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def mean_scores(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over several answers about the same reply."""
    return {name: sum(sample[name] for sample in samples) / len(samples) for name in samples[0]}
