"""What was trained offline reaches W&B later, with everything: `echat sync`, by the real client."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile
import wandb

from lightning_echat import cli
from lightning_echat.tracking.defaults import WANDB_DEFAULTS
from lightning_echat.tracking.identity import read_identity
from lightning_echat.tracking.lineage import read_lineage
from lightning_echat.tracking.metric_table import BOOKKEEPING, metric_of
from tests.tiny_experiment import MEASURING, write_experiment
from tests.wandb_log import OfflineRun, pieces, read_piece, records
from tests.wandb_stub import WandbStub, running_stub
from tests.wandb_stub_state import Run

STAGES = ("understanding", "generation", "empathy")
TABLE = {"class_path": "tests.tiny_experiment.LogTable"}


@dataclass
class Synced:
    """An experiment of three stages, trained offline and sent: the first in two pieces."""

    folder: Path
    stub: WandbStub
    said: list[str]

    def stage(self, name: str) -> tuple[list[OfflineRun], Run]:
        """What the pieces hold on disk, and what arrived."""
        identity = read_identity(self.folder / name)
        assert identity is not None
        logs = [read_piece(records(path)) for path in pieces(self.folder / name)]
        return logs, self.stub.runs[identity.id]


@pytest.fixture(scope="module")
def synced(tmp_path_factory, tokens) -> Iterator[Synced]:
    folder = tmp_path_factory.mktemp("offline") / "talk"
    with running_stub() as stub, pytest.MonkeyPatch.context() as patch:
        for name, value in {**stub.environment(folder.parent), **WANDB_DEFAULTS}.items():
            patch.setenv(name, value)
        # Media is staged where the command puts it: in the run's folder.
        patch.delenv("WANDB_DATA_DIR")
        wandb.teardown()
        first = write_experiment(folder / "understanding", tokens, TABLE, *MEASURING, stage="understanding")
        cli.main(["fit", "--config", str(first), "--trainer.max_steps", "2"])
        cli.main(["fit", "--config", str(first), "--ckpt_path", "last"])
        for before, stage in pairwise(STAGES):
            config = write_experiment(folder / stage, tokens, *MEASURING, stage=stage)
            cli.main(["fit", "--config", str(config), "--model.init_args.init_from", str(folder / before)])
        wandb.teardown()
        assert not stub.runs
        said: list[str] = []
        patch.setattr("lightning_echat.tracking.sync._say", said.append)
        cli.main(["sync", str(folder)])
        cli.main(["sync", str(folder)])
        yield Synced(folder, stub, said)
        wandb.teardown()


def values(row: dict[str, Any]) -> dict[str, Any]:
    """The scalars of a row that a user logged."""
    return {key: value for key, value in row.items() if not key.startswith("_") and isinstance(value, int | float)}


def test_the_pieces_of_a_run_that_was_continued_become_one_run(synced: Synced):
    logs, run = synced.stage("understanding")
    assert len(logs) == 2 and len(synced.stub.runs) == 3
    logged = [values(row) for log in logs for row in log.history]
    assert [values(row) for row in run.history] == logged
    assert [value for log in logs for _, value in log.series("train/loss")] == run.series("train/loss")
    assert len(run.series("train/loss")) == 4
    assert run.summary["ended"] == "finished" and run.exit_code == 0
    assert run.summary["trainer/global_step"] == logged[-1]["trainer/global_step"]
    assert (run.group, run.job_type) == ("talk", "understanding")


def test_tables_can_be_heard_and_images_seen(synced: Synced):
    _, run = synced.stage("understanding")
    rows = [row for row in run.history if "val/table" in row]
    for row, step in zip(rows, (2, 4), strict=True):
        table, files = synced.stub.table(row, "val/table")
        ((logged, sound),) = table["data"]
        waveform, rate = soundfile.read(io.BytesIO(files[sound["path"]]))
        assert (logged, rate, len(waveform)) == (step, 8000, 800)
        assert waveform[0] == pytest.approx(step / 10, abs=1e-3) and sound["caption"] == f"step {step}"
        assert run.files[row["val/image"]["path"]].startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_that_a_stage_logs_is_in_the_metric_table(synced: Synced, stage: str):
    logs, _ = synced.stage(stage)
    logged = {key for log in logs for row in log.history for key in row if not key.startswith("_")}
    assert len(logged) > 15
    ours = {"val/table", "val/image"}
    assert [key for key in logged - set(BOOKKEEPING) - ours if metric_of(key) is None] == []


def test_the_summary_holds_the_best_value_and_the_last(synced: Synced):
    logs, run = synced.stage("empathy")
    losses = [value for _, value in logs[0].series("train/loss")]
    assert run.summary["train/loss"] == {"min": min(losses), "last": losses[-1]}
    assert run.summary["perf/steps_per_second"] > 0


def test_alerts_arrive(synced: Synced):
    assert [alert["text"] for alert in synced.stub.alerts] == ["step 2", "step 4"]


def test_lineage_is_declared_by_the_sync_and_once(synced: Synced):
    _, run = synced.stage("empathy")
    lineage = read_lineage(synced.folder / "empathy")
    assert lineage.declared and lineage.started_from == read_lineage(synced.folder / "generation").made
    assert lineage.started_from is not None
    artifact = synced.stub.artifact(lineage.started_from.artifact)
    assert artifact is not None and run.used == [artifact.id]
    assert run.config["lineage"]["sha256"] == lineage.started_from.sha256 == artifact.metadata["sha256"]


def test_what_is_there_is_not_sent_again(synced: Synced):
    assert [line for line in synced.said if "sent" in line] == [
        "4 sent, 0 were there already; 2 inputs of stages declared",
        "0 sent, 4 were there already; 0 inputs of stages declared",
    ]


def test_the_client_asked_nothing_that_the_stand_in_does_not_know(synced: Synced):
    assert synced.stub.unknown == []


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["sync", str(tmp_path)])
    assert leaving.value.code == 2 and "holds no offline W&B run" in capsys.readouterr().err
