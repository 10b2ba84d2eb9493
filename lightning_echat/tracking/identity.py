"""Which W&B run a training is: one id a stage, kept in the run's folder from before the first step on.

Everything is handed to W&B through its own environment variables, so that what a user, an agent or a study has set
there wins, and so that the resolved configuration, which runs a run again, holds no id.
"""

from __future__ import annotations

import json
import os
import secrets
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_echat.data.files import write_json

FILE = "wandb_run.json"
_VARIABLES = {"id": "WANDB_RUN_ID", "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE", "name": "WANDB_NAME"}
_IN_AN_ID = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What W&B knows a run by.

    Attributes:
        id: Unique in the project, kept over restarts.
        group: The experiment: stages below one folder, trials of one sweep.
        job_type: The stage, or the command where nothing is trained.
        name: What its page is called.
    """

    id: str
    group: str
    job_type: str
    name: str

    def environment(self) -> dict[str, str]:
        """The variables that tell W&B."""
        return {variable: value for key, variable in _VARIABLES.items() if (value := getattr(self, key))}


def identify(folder: Path, *, job_type: str, goes_on: bool, environment: Mapping[str, str]) -> RunIdentity:
    """The identity of a run that is about to start.

    Args:
        folder: The run's.
        job_type: Its stage or command.
        goes_on: Whether it continues what an earlier run in this folder has begun, if there was one.
        environment: Variables that are set already win, the id included.
    """
    before = read_identity(folder) if goes_on else None
    group = before.group if before else folder.absolute().parent.name
    given = {key: environment[variable] for key, variable in _VARIABLES.items() if environment.get(variable)}
    found = {
        "id": before.id if before else "".join(secrets.choice(_IN_AN_ID) for _ in range(8)),
        "group": group,
        "job_type": job_type,
        # A sweep names its trials.
        "name": "" if "WANDB_SWEEP_ID" in environment else f"{group}/{folder.name}",
    }
    return RunIdentity(**{**found, **given})


def read_identity(folder: Path) -> RunIdentity | None:
    """What the folder's run is; None where none was started, or the file cannot be read."""
    try:
        return RunIdentity(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        # A run that cannot be continued under its id is begun under another; nothing of the old one is touched.
        return None


def write_identity(folder: Path, identity: RunIdentity) -> None:
    """Keep it. Before training begins, so that a run that is killed in its first step is continued as itself."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, content=asdict(identity))


def continues(ckpt_path: str | None, *, folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether a training goes on with what its folder holds: asked to, or restarted by torchrun after a fault."""
    if int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    if ckpt_path in ("last", "hpc", "best"):
        return True
    return ckpt_path is not None and folder.absolute() in Path(ckpt_path).absolute().parents


def trial_folder(folder: Path, environment: Mapping[str, str]) -> Path:
    """Where a trial of `wandb agent` writes: a folder of its own, as all trials are given the same one."""
    trial = environment.get("WANDB_RUN_ID", "")
    return folder / trial if environment.get("WANDB_SWEEP_ID") and trial and folder.name != trial else folder


@contextmanager
def identity_of_this_command() -> Iterator[None]:
    """Take back, at the end of a command, what was set for its run: the next command's is another."""
    before = {variable: os.environ.get(variable) for variable in (*_VARIABLES.values(), "WANDB_DATA_DIR")}
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
