"""README.md of a converted folder: what the model is, what it was measured to do, and its terms of use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lightning_echat import __version__
from lightning_echat.contracts import UserError

SPOKEN = "An empathetic spoken dialogue model: it hears speech and answers in text and speech codes."


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """What nobody but the user knows about a model.

    Attributes:
        name: Of the model; the folder's name without it.
        license: Identifier as the Hugging Face hub has it. The licences of what the model was made from bind it.
        base_model: What its weights started from, for instance Qwen/Qwen2.5-3B-Instruct.
        datasets: Data that it was trained on.
        language: Languages that it speaks.
    """

    name: str = ""
    license: str = "unknown"
    base_model: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)


def write_card(
    fields: CardFields, *, name: str, about: str, report: Path | None, usage: str, spoken: bool = True
) -> str:
    """The text of a model card.

    Args:
        fields: What the user gave.
        name: Of the model where the user gave none.
        about: What the model is and where its weights come from.
        report: report.json of `echat evaluate`; the card says so where there is none.
        usage: Code that loads the model.
        spoken: Whether it hears and speaks; otherwise it is a language model that plain `transformers` loads.

    Raises:
        UserError: The report cannot be read.
    """
    name = fields.name or name
    task = "audio-text-to-text" if spoken else "text-generation"
    scores = list(_scores(_read_report(report))) if report else []
    data = ModelCardData(
        model_name=name,
        license=fields.license,
        base_model=fields.base_model or None,
        datasets=fields.datasets,
        language=fields.language or None,
        library_name="lightning-echat" if spoken else "transformers",
        pipeline_tag=task,
        tags=["speech", "spoken-dialogue", "empathy"] if spoken else None,
        metrics=sorted({kind for kind, *_ in scores}),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="lightning-echat",
                dataset_name=split,
                metric_type=kind,
                metric_name=what,
                metric_value=value,
            )
            for kind, what, split, value in scores
        ]
        or None,
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        about,
        f"Written by lightning-echat {__version__}.",
        "## Use",
        f"```\n{usage}\n```",
        "## Measured",
        _table(scores) if scores else "Nothing was measured on these weights when the folder was written.",
        "## Terms",
        f"Licence: {fields.license}. The licences of the models and data that it was made from apply as well.",
    ]
    return "\n\n".join(lines) + "\n"


def _read_report(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read report {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no report")
    return content


def _scores(report: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Kind, name, set and value of every score that the report holds as a number."""
    heard = report.get("understanding") or {}
    split = str(heard.get("set", "understanding"))
    if isinstance(heard.get("wer"), int | float):
        yield "wer", "WER", split, heard["wer"]
    for label_set, value in (heard.get("accuracy") or {}).items():
        if isinstance(value, int | float):
            yield "accuracy", f"accuracy of {label_set}", split, value
    empathy = report.get("empathy") or {}
    for part, value in empathy.items():
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            yield "empathy", f"empathy, {part} (0 to 100, {empathy.get('judge', 'rubric')})", "dialogues", value[0]


def _table(scores: list[tuple[str, str, str, float]]) -> str:
    rows = [f"| {what} | {split} | {value:.3f} |" for _, what, split, value in scores]
    return "\n".join(["| what | set | value |", "| --- | --- | --- |", *rows])
