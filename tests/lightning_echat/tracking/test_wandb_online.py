"""Trainings online, by the real client against the stand-in for W&B's server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from lightning_echat import cli
from lightning_echat.tracking.identity import read_identity
from lightning_echat.tracking.lineage import read_lineage
from tests.tiny_experiment import write_experiment
from tests.wandb_stub import WandbStub, running_stub
from tests.wandb_stub_state import Run


def fit(config: Path, *words: str) -> None:
    cli.main(["fit", "--config", str(config), *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokens) -> Iterator[tuple[WandbStub, Path]]:
    """An experiment of two stages; the first was stopped after two steps and continued, the second started from it."""
    folder = tmp_path_factory.mktemp("online") / "talk"
    with running_stub() as stub, pytest.MonkeyPatch.context() as patch:
        for name, value in stub.environment(folder.parent).items():
            patch.setenv(name, value)
        # The client keeps the settings that it has first seen.
        wandb.teardown()
        first = write_experiment(folder / "understanding", tokens, stage="understanding")
        fit(first, "--trainer.max_steps", "2")
        fit(first, "--ckpt_path", "last")
        second = write_experiment(folder / "empathy", tokens)
        fit(second, "--model.init_args.init_from", str(folder / "understanding"))
        yield stub, folder
        wandb.teardown()


def run_of(stub: WandbStub, folder: Path) -> Run:
    identity = read_identity(folder)
    assert identity is not None
    return stub.runs[identity.id]


def test_the_client_asked_nothing_that_the_stand_in_does_not_know(trained):
    stub, _ = trained
    assert stub.unknown == []


def test_there_is_one_run_a_stage_grouped_by_experiment(trained):
    stub, folder = trained
    assert len(stub.runs) == 2
    for stage in ("understanding", "empathy"):
        run = run_of(stub, folder / stage)
        assert (run.group, run.job_type, run.given["displayName"]) == ("talk", stage, f"talk/{stage}")
        assert run.exit_code == 0 and run.summary["ended"] == "finished"


def test_a_continued_run_goes_on_in_its_page(trained):
    stub, folder = trained
    run = run_of(stub, folder / "understanding")
    losses = [row["trainer/global_step"] for row in run.history if "train/loss" in row]
    assert losses == [0, 1, 2, 3]
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))


def test_the_next_stage_declares_the_artifact_of_the_stage_before(trained):
    stub, folder = trained
    made = read_lineage(folder / "understanding").made
    lineage = read_lineage(folder / "empathy")
    assert lineage.started_from == made and lineage.declared
    assert made is not None
    artifact = stub.artifact(made.artifact)
    assert artifact is not None and artifact.metadata["sha256"] == made.sha256 and artifact.metadata["step"] == 4
    assert run_of(stub, folder / "empathy").used == [artifact.id]
    assert run_of(stub, folder / "empathy").config["lineage"]["run_id"] == artifact.run
    # Weights stay where they are unless one asks for them.
    assert list(stub.content(artifact)) == ["checkpoint.json"]


def test_the_configuration_that_runs_a_run_again_holds_no_id(trained):
    _, folder = trained
    identity = read_identity(folder / "empathy")
    assert identity is not None and identity.id not in (folder / "empathy" / "config.yaml").read_text()
