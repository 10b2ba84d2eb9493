"""Questions to a chat server and its answers, as the record on disk knows them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """What a server answered.

    Attributes:
        text: Its words; empty where it said nothing.
        cut: It was cut at the length that was asked for, by what the server says.
    """

    text: str
    cut: bool = False

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> ChatAnswer:
        """The first choice of a completion."""
        choice = raw["choices"][0]
        return cls(text=choice["message"]["content"] or "", cut=choice.get("finish_reason") == "length")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One question.

    Attributes:
        key: Names it in the record, for people.
        body: What is sent.
        sample: Number among repetitions of the same question, which is not sent.
    """

    key: str
    body: Mapping[str, Any]
    sample: int = 0

    @property
    def hash(self) -> str:
        """Of everything that decides the answer."""
        return hashlib.sha256(json.dumps([self.body, self.sample], sort_keys=True).encode()).hexdigest()

    @property
    def prompt_hash(self) -> str:
        """Of the messages alone."""
        return hashlib.sha256(json.dumps(self.body["messages"], sort_keys=True).encode()).hexdigest()


def read_answers(path: Path) -> dict[str, ChatAnswer]:
    """Request hash -> answer. A line that a kill tore is asked again."""
    if not path.is_file():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line) if line else {}
        except json.JSONDecodeError:
            continue
        if "reply" in row:
            known[row["request"]] = ChatAnswer.of(row["raw"])
    return known


def end_torn_line(path: Path) -> None:
    """Give a last line that a kill tore an end, so that what is appended begins a new one."""
    if path.is_file() and (size := path.stat().st_size):
        with path.open("rb+") as stream:
            stream.seek(size - 1)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
