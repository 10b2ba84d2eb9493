"""The released model's prompts, out of the user's own clone of its code, as a prompt set.

The weights were trained with these words, so they are wanted for running and for continuing; they belong to their
authors and are not part of this project. The clone is parsed and never executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.contracts import UserError
from lightning_echat.data.reference_tags import LABEL_SPELLINGS

_MODEL_FILE = "wenet/osum_echat/llmasr_model_instruct_version.py"
_LABEL_THINKING_FILE = "wenet/dataset/process/processor_tag_think.py"
_INSTRUCTIONS_FILE = "conf/prompt_config.yaml"
CONFIG_FILE = "conf/ct_config.yaml"
_PROJECT = "OSUM-EChat"
"""Folder of a clone of the whole repository in which the code lies."""

OUTPUT_TYPES = {
    "transcribe": "text",
    "transcribe_and_label": "text",
    "label": "text",
    "speech_to_text": "s2t_chat",
    "speech_to_text.label_thinking": "s2t_chat_think",
    "speech_to_text.natural_thinking": "s2t_chat_think",
    "speech_to_speech": "speech2text_token",
    "speech_to_speech.interleaved": "speech2text_token_streaming",
    "speech_to_speech.label_thinking": "speech2text_token_think",
    "speech_to_speech.natural_thinking": "speech2text_token_think",
    # Never trained there: thinking, then the two interleaved.
    "speech_to_speech.label_thinking.interleaved": "speech2text_token_think",
    "speech_to_speech.natural_thinking.interleaved": "speech2text_token_think",
    "text_to_text": "text2text",
    "text_to_speech": "text2token",
    "text_to_speech.interleaved": "text2token_streaming",
}
"""Task -> what the reference calls its output type, which there decides the system prompt."""

_LABEL_TAGS = {"<AGE>": "age", "<GENDER>": "gender", "<EMOTION>": "emotion", "<CAPTION>": "event", "<STYLE>": "style"}
_THINKING_NAMES = {
    "q_txt": "transcript",
    "age_tag": "age",
    "gender_tag": "gender",
    "q_emotion_tag": "emotion",
    "caption_tag": "event",
    "emotion_tag": "reply_emotion",
}
"""Names that the reference puts into its label thinking, and what they hold."""


@dataclass(slots=True, kw_only=True)
class ReferencePrompts:
    """The words around a dialogue, as the reference has them.

    Attributes:
        system: Output type -> system block, markers included.
        user: Opens a user turn.
        assistant: Closes a user turn and opens the assistant's.
        earlier_user_end, earlier_reply_end: Close the turns of an earlier exchange.
        instructions: Task tag of the reference -> instructions.
        thinking: The wording of label thinking, as `tokens.thinking.ThinkingFormat` has it; empty where unknown.
    """

    system: dict[str, str]
    user: str
    assistant: str
    earlier_user_end: str = "<|im_end|>\n"
    earlier_reply_end: str = "<|im_end|>\n"
    instructions: dict[str, list[str]] = field(default_factory=dict)
    thinking: dict[str, Any] = field(default_factory=dict)


def reference_prompt_set(prompts: ReferencePrompts) -> dict[str, Any]:
    """The content of a prompt set file with the reference's words and layouts.

    Earlier exchanges stand as in its training: a spoken query without marks, its end twice, the reply's text without
    its end, and the reply's speech.

    Raises:
        UserError: An output type has no system prompt.
    """
    if missing := sorted({kind for kind in OUTPUT_TYPES.values() if kind not in prompts.system}):
        raise UserError(f"no system prompt for {', '.join(missing)}; is the clone the released OSUM-EChat?")
    tasks: dict[str, dict[str, Any]] = {task: {"system": prompts.system[kind]} for task, kind in OUTPUT_TYPES.items()}
    for tag, wordings in prompts.instructions.items():
        if tag == "<TRANSCRIBE>":
            tasks["transcribe"]["instructions"] = wordings
            continue
        task = "transcribe_and_label" if tag.startswith("<TRANSCRIBE> ") else "label"
        names = [_LABEL_TAGS.get(part) for part in tag.removeprefix("<TRANSCRIBE> ").split()]
        if all(names):
            tasks[task].setdefault("instructions_for", {})[", ".join(map(str, names))] = wordings
    return {
        "name": "reference",
        "system": "{text}",
        "user": prompts.user,
        "assistant": prompts.assistant,
        "turn_end": prompts.earlier_reply_end,
        "history": {
            "assistant": prompts.earlier_user_end + prompts.assistant,
            "speech_marks": False,
            "end_of_text": False,
            "speech_codes": True,
        },
        "tasks": tasks,
        **({"thinking": {**prompts.thinking, "spellings": _spellings()}} if prompts.thinking else {}),
    }


def read_clone(clone: Path) -> ReferencePrompts:
    """Read the prompts of a clone of the reference, or of its folder OSUM-EChat.

    Raises:
        UserError: The file that holds them is not there, or they are not in it.
    """
    root = find_root(clone)
    path = root / _MODEL_FILE
    if not path.is_file():
        raise UserError(f"{clone} has no {_MODEL_FILE}; give a clone of the OSUM repository")
    tree = _parse(path)
    constants = _string_constants(tree)
    system = dict(_system_prompts(tree, constants))
    user = _after_system_prompt(tree)
    assistant = constants.get("assistant_start") or constants.get("qwen_instruct_prompt_pattern_2")
    if not system or user is None or assistant is None:
        raise UserError(f"{path}: no prompts found where the released code has them; give an unchanged clone")
    ends = {
        f"earlier_{ours}": constants[theirs]
        for ours, theirs in (("user_end", "user_end"), ("reply_end", "assistant_end"))
        if theirs in constants
    }
    return ReferencePrompts(
        system=system,
        user=user,
        assistant=assistant,
        instructions=_read_instructions(root),
        thinking=_read_thinking(root),
        **ends,
    )


def find_root(clone: Path) -> Path:
    """The folder of the code in a clone."""
    return clone / _PROJECT if (clone / _PROJECT).is_dir() else clone


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be parsed: {error}") from error


def _read_thinking(root: Path) -> dict[str, Any]:
    """The wording of label thinking; a clone that has none of this form gives nothing."""
    path = root / _LABEL_THINKING_FILE
    formatted = (node for node in ast.walk(_parse(path)) if isinstance(node, ast.JoinedStr)) if path.is_file() else ()
    return next((wording for node in formatted if (wording := _thinking_of(node))), {})


def _thinking_of(node: ast.JoinedStr) -> dict[str, Any]:
    """An f-string such as `<think>heard {q_txt}, age {age_tag}, reply {emotion_tag}, so<think end>`, taken apart."""
    words: list[str] = [""]
    fields: list[str] = []
    for value in node.values:
        if isinstance(value, ast.Constant):
            words[-1] += str(value.value)
        elif isinstance(value, ast.FormattedValue):
            fields.append(_THINKING_NAMES.get(ast.unparse(value.value), ""))
            words.append("")
    start, end = re.match(r"<[^<>]+>", words[0]), re.search(r"<[^<>]+>$", words[-1])
    framed = len(fields) > 2 and fields[0] == "transcript" and fields[-1] == "reply_emotion"
    if not framed or not all(fields) or start is None or end is None:
        return {}
    # What stands before every label is no part of its introduction.
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*words[1:-1], strict=False))
    separator = "".join(letters[0] for letters in same)
    intros = [word.removeprefix(separator) for word in words[1:-1]]
    return {
        "open": start[0],
        "close": end[0],
        "transcript": words[0][start.end() :],
        "fields": dict(zip(fields[1:-1], intros[:-1], strict=True)),
        "reply_emotion": intros[-1],
        "separator": separator,
        "ending": words[-1][: end.start()],
    }


def _spellings() -> dict[str, dict[str, str]]:
    """How the released weights may write labels, for a prompt set."""
    return {
        name: {spelling.lower(): label for label, spelled in labels.items() for spelling in spelled}
        for name, labels in LABEL_SPELLINGS.items()
        if labels
    }


def _read_instructions(root: Path) -> dict[str, list[str]]:
    """Task tag -> instructions; a clone without the file has none."""
    path = root / _INSTRUCTIONS_FILE
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {str(tag): [str(line) for line in lines] for tag, lines in content.items()}
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{path} does not map tasks to lists of prompts: {str(error).splitlines()[0]}") from error


def _string_constants(tree: ast.AST) -> dict[str, str]:
    """Every `name = "…"`, anywhere; the first of several."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, node.value.value)
    return found


def _system_prompts(tree: ast.AST, constants: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs from `if output_type == "…" [or …]: system_prompt = NAME`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.If):
            continue
        chosen = [
            constants.get(statement.value.id)
            for statement in node.body
            if isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Name)
            and any(isinstance(target, ast.Name) and target.id == "system_prompt" for target in statement.targets)
        ]
        if chosen and chosen[0] is not None:
            for kind in _compared_with(node.test):
                yield kind, chosen[0]


def _compared_with(test: ast.expr) -> Iterator[str]:
    """The strings that a condition compares `output_type` with."""
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "output_type":
            for comparator in node.comparators:
                if isinstance(comparator, ast.Constant) and isinstance(comparator.value, str):
                    yield comparator.value


def _after_system_prompt(tree: ast.AST) -> str | None:
    """What `system_prompt + "…"` adds: the header of the user's turn."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Add)
            and isinstance(node.left, ast.Name)
            and node.left.id == "system_prompt"
            and isinstance(node.right, ast.Constant)
            and isinstance(node.right.value, str)
        ):
            return node.right.value
    return None
