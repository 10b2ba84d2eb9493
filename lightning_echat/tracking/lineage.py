"""From which stage's weights a stage started, and which it made: artifacts in W&B, `lineage.json` in the run's folder.

An artifact of a stage holds one small file that names the checkpoint, by path, SHA-256, size and step; its weights go
along where that is asked for. It is called `model-ID` after the run, with the alias `sha-…` after the content, so a
stage's input can be named without a server. W&B takes artifacts offline, but no declaration of an input: that is kept
in the file and in the run's configuration until `echat sync` declares it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import wandb

from lightning_echat.data.files import write_json
from lightning_echat.nn.weights import latest_checkpoint
from lightning_echat.tracking.identity import read_identity

FILE = "lineage.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModel:
    """The weights that a stage ended with.

    Attributes:
        artifact: Name and alias in W&B, without project; empty where no run made them that W&B knows.
        project: Where that artifact is.
        run_id: The run that made them; empty for what did not come from a run.
        checkpoint: Path, as it was when the stage ended.
        sha256: Of the file, or of a sharded checkpoint's files in order; empty where it was not computed.
        bytes: Size of the whole.
        step: Optimizer steps that the stage had made.
    """

    artifact: str
    project: str
    run_id: str
    checkpoint: str
    sha256: str
    bytes: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """What `lineage.json` holds.

    Attributes:
        started_from: The earlier stage's weights; None for a stage that starts from none.
        declared: Whether W&B has been told of them.
        made: This stage's own, once it has ended.
    """

    started_from: StageModel | None = None
    declared: bool = False
    made: StageModel | None = None


def read_lineage(folder: Path) -> Lineage:
    """The lineage of a run's folder; empty where there is none."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        models = {key: StageModel(**content[key]) if content[key] else None for key in ("started_from", "made")}
        return Lineage(declared=content["declared"], **models)
    except (OSError, ValueError, TypeError, KeyError):
        return Lineage()


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Keep it."""
    write_json(folder / FILE, content=asdict(lineage))


def model_of(folder: Path, *, run_id: str, project: str, step: int) -> StageModel:
    """Describe the newest checkpoint of a run's folder, which it reads once for the hash."""
    checkpoint = latest_checkpoint(folder).resolve()
    digest, size = _digest(checkpoint)
    return StageModel(
        artifact=f"model-{run_id}:sha-{digest[:12]}" if run_id else "",
        project=project,
        run_id=run_id,
        checkpoint=str(checkpoint),
        sha256=digest,
        bytes=size,
        step=step,
    )


def model_at(path: str) -> StageModel:
    """What is known of the checkpoint that a stage starts from, without reading it."""
    checkpoint = latest_checkpoint(path).resolve()
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        made = read_lineage(folder).made
        if made and made.checkpoint == str(checkpoint) and made.bytes == _size(checkpoint):
            return made
        if identity := read_identity(folder):
            # A run's checkpoint, but not its last: nothing in W&B stands for it.
            return _unnamed(checkpoint, run_id=identity.id)
    return _unnamed(checkpoint, run_id="")


def _unnamed(checkpoint: Path, *, run_id: str) -> StageModel:
    size = _size(checkpoint)
    return StageModel(
        artifact="", project="", run_id=run_id, checkpoint=str(checkpoint), sha256="", bytes=size, step=-1
    )


def log_model(run: Any, model: StageModel, *, upload: bool) -> None:
    """Log a stage's weights as an artifact of its W&B run, online or offline; the content too with `upload`."""
    name, _, alias = model.artifact.partition(":")
    artifact = wandb.Artifact(name, type="model", metadata=asdict(model))
    with artifact.new_file("checkpoint.json") as file:
        json.dump(asdict(model), file, indent=2)
    if upload:
        path = Path(model.checkpoint)
        # Not copied into staging: an online run uploads it before it ends, an offline one's sync reads it in place.
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), policy="immutable")
    run.log_artifact(artifact, aliases=[alias, f"step-{model.step}"])


def declare_input(run: Any, model: StageModel) -> None:
    """Tell W&B that a run started from these weights.

    Args:
        run: One that is online, or one that `wandb.Api` has found.
        model: With the name of an artifact.

    Raises:
        wandb.errors.CommError, ValueError: W&B does not know the artifact, or cannot be reached.
    """
    artifact = wandb.Api().artifact(f"{run.entity}/{model.project}/{model.artifact}")
    run.use_artifact(artifact)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file()) if checkpoint.is_dir() else [checkpoint]


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in _files(checkpoint))


def _digest(checkpoint: Path) -> tuple[str, int]:
    """SHA-256 and size."""
    total = hashlib.sha256()
    for path in _files(checkpoint):
        with path.open("rb") as file:
            if not checkpoint.is_dir():
                return hashlib.file_digest(file, "sha256").hexdigest(), _size(checkpoint)
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest(), _size(checkpoint)
