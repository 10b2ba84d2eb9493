"""What the stand-in for W&B's server remembers: runs, artifacts, sweeps."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(slots=True)
class Run:
    """What the server knows of a run.

    Attributes:
        config: Key -> value, W&B's own under `_wandb`.
        streams: Lines of the run's streams by number: history, events, summary, output.
        files: Name -> content of the files that were uploaded.
        starts: How often a client began or resumed it.
        used: Ids of the artifacts that it declared as inputs.
    """

    name: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    files: dict[str, bytes] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    starts: int = 0
    exit_code: int | None = None

    @property
    def group(self) -> str | None:
        return self.given.get("groupName")

    @property
    def job_type(self) -> str | None:
        return self.given.get("jobType")

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.streams["wandb-history.jsonl"].items())]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.streams["wandb-summary.json"].get(0, "{}"))

    def series(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]


@dataclass(slots=True)
class Artifact:
    """A version of an artifact; `files` is path -> content, `references` path -> address."""

    id: str
    name: str
    kind: str
    project: str
    run: str
    client_id: str
    sequence_id: str
    digest: str
    metadata: dict[str, Any]
    aliases: set[str]
    version: int | None = None
    manifest_file: str = ""
    paths: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Sweep:
    """A sweep and its trials: id -> parameters."""

    name: str
    project: str
    text: str
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load(self.text)
