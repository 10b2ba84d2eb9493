"""Prompt sets: every word around a dialogue, as data. YAML selects one by name, or a file of one's own by path."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.contracts import UserError
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.tasks import ALL_TASK_NAMES, DialogueTask
from lightning_echat.tokens.thinking import ThinkingFormat

_FOLDER = Path(__file__).parent / "prompt_sets"


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryFormat:
    """How an earlier exchange of a conversation is written, where that differs from the one that is answered.

    Attributes:
        assistant: Closes an earlier user turn and opens the reply to it.
        turn_end: Follows an earlier reply.
        speech_marks: Whether the marks of input speech stand around an earlier spoken query.
        end_of_text: Whether the text of an earlier reply keeps its end of text.
        speech_codes: Whether an earlier reply keeps its speech codes, for tasks that speak.
    """

    assistant: str
    turn_end: str
    speech_marks: bool = True
    end_of_text: bool = True
    speech_codes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The wording of prompts and headers.

    Attributes:
        name: How reports call it.
        system: Task name -> system block as it stands at the start of the row, markers included.
        instructions: Task name -> instructions, one of which precedes the query; may hold {labels}. Those under
            `NAME LABELS`, for instance "label age, gender", are for these label sets alone and come first.
        user: Opens a user turn.
        assistant: Closes a user turn and opens the assistant's.
        history: How earlier exchanges are written.
        thinking: The wording of label thinking.
    """

    name: str
    system: dict[str, str]
    instructions: dict[str, list[str]]
    user: str
    assistant: str
    history: HistoryFormat
    thinking: ThinkingFormat = field(default_factory=ThinkingFormat)

    def instruction(self, task: DialogueTask, choice: int) -> str:
        """The instruction number `choice` (modulo how many there are), labels filled in; empty where there is none."""
        labels = ", ".join(task.labels)
        wordings = self.instructions.get(f"{task.name} {labels}") or self.instructions.get(task.name)
        if not wordings:
            return ""
        return wordings[choice % len(wordings)].replace("{labels}", labels)


def prompt_set_file(name_or_path: str) -> Path:
    """The YAML file of a prompt set that the package ships, by name, or any of the same form, by path."""
    shipped = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped)}, or give a YAML file"
        raise UserError(f"no prompt set {name_or_path!r}; {hint}")
    return path


def load_prompt_set(name_or_path: str) -> PromptSet:
    """Read the prompt set that `prompt_set_file` finds; `UserError` when it is not of the form."""
    path = prompt_set_file(name_or_path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _prompt_set(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"prompt set {path}: {error!r}; see the shipped english.yaml for the form") from error


def _prompt_set(content: dict[str, Any]) -> PromptSet:
    tasks: dict[str, dict[str, Any]] = content["tasks"]
    for name in ALL_TASK_NAMES:
        if name not in tasks:
            raise KeyError(f"tasks.{name} is missing")
    unknown = [name for name in tasks if name not in ALL_TASK_NAMES]
    if unknown:
        raise KeyError(f"tasks.{unknown[0]} is no task")
    thinking = dict(content.get("thinking", {}))
    for key, known in (("fields", LABEL_SETS), ("spellings", [*LABEL_SETS, "reply_emotion"])):
        if unknown := [name for name in thinking.get(key, {}) if name not in known]:
            raise KeyError(f"thinking.{key}.{unknown[0]} is no label set")
    system = content["system"]
    return PromptSet(
        name=content["name"],
        system={
            name: system.replace("{text}", entry["system"]) if entry["system"] else "" for name, entry in tasks.items()
        },
        instructions=_instructions(tasks),
        user=content["user"],
        assistant=content["assistant"],
        history=HistoryFormat(
            **{"assistant": content["assistant"], "turn_end": content["turn_end"], **content.get("history", {})}
        ),
        thinking=ThinkingFormat(**thinking),
    )


def _instructions(tasks: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Instructions of each task, and those that are for certain label sets only, as `PromptSet.instruction` looks."""
    found = {name: list(entry.get("instructions", [])) for name, entry in tasks.items()}
    for name, entry in tasks.items():
        for labels, wordings in entry.get("instructions_for", {}).items():
            if unknown := [label for label in labels.split(", ") if label not in LABEL_SETS]:
                raise KeyError(f"tasks.{name}.instructions_for.{unknown[0]} is no label set")
            found[f"{name} {labels}"] = list(wordings)
    return found
