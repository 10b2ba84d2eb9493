"""What is wrong is told, once, and what is right is not."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from callbacks.alerts import Alerts
from lightning_echat import cli
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer
from tests.wandb_stub import running_stub


class Diverging(FakeStage):
    """Its loss is no number from the third step on."""

    def training_step(self, batch, batch_idx):
        self.log("train/loss", float("nan") if self.global_step >= 2 else 1.0)
        return self.weight(torch.ones(1, 4)).sum()


class Sleepy(FakeStage):
    """Stands still in its second and its third step."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.6 if self.global_step in (1, 3) else 0.0)
        return super().training_step(batch, batch_idx)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "callbacks.alerts"]


def fit(folder: Path, stage: FakeStage, alerts: Alerts, *, health: dict[str, int] | None = None, steps: int = 6):
    batches = [make_batch(health=dict(health or {})) for _ in range(steps)]
    make_trainer(folder, alerts).fit(stage, datamodule=FakeData(train=batches))


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def test_a_loss_that_is_no_number_is_told_once(tmp_path, caplog):
    fit(tmp_path, Diverging(), Alerts())
    assert told(caplog) == ["Loss is not a number: train/loss is nan at step 3"]


def test_standing_still_is_told_once_for_each_time(tmp_path, caplog):
    fit(tmp_path, Sleepy(), Alerts(stall_minutes=0.2 / 60))
    assert [line.split(": ")[0] for line in told(caplog)] == ["Run stands still"] * 2
    assert told(caplog)[0].endswith("minutes since step 1") and told(caplog)[1].endswith("since step 3")


def test_skipped_data_is_told_once_it_is_more_than_its_share(tmp_path, caplog):
    health = {"read": 10, "kept": 9, "skipped/no turns": 1}
    fit(tmp_path, FakeStage(), Alerts(skip_share=0.05, samples_to_judge=30), health=health)
    (line,) = told(caplog)
    assert line.startswith("Data is skipped: 3 of 30 samples were skipped, most for 'no turns'")


class Unlucky(FakeStage):
    """Its second step stands still and gives no number."""

    def training_step(self, batch, batch_idx):
        self.log("train/loss", float("nan") if self.global_step >= 1 else 1.0)
        time.sleep(0.6 if self.global_step == 1 else 0.0)
        return self.weight(torch.ones(1, 4)).sum()


def test_alerts_of_a_run_offline_reach_w_and_b_with_the_sync(tmp_path, monkeypatch):
    with running_stub() as stub:
        for name, value in {**stub.environment(tmp_path), "WANDB_MODE": "offline"}.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()
        alerts = Alerts(stall_minutes=0.2 / 60, skip_share=0.05, samples_to_judge=30)
        batches = [make_batch(health={"read": 10, "kept": 8, "skipped/no turns": 2}) for _ in range(4)]
        logger = WandbLogger(project="p", save_dir=tmp_path)
        make_trainer(tmp_path, alerts, logger=logger).fit(Unlucky(), datamodule=FakeData(train=batches))
        wandb.finish()
        wandb.teardown()
        assert stub.alerts == []
        cli.main(["sync", str(tmp_path)])
        assert sorted(alert["title"] for alert in stub.alerts) == [
            "Data is skipped",
            "Loss is not a number",
            "Run stands still",
        ]
        assert {alert["severity"] for alert in stub.alerts} == {"WARN"}


def test_a_run_that_goes_well_says_nothing(tmp_path, caplog):
    health = {"read": 10, "kept": 9, "skipped/no turns": 1}
    fit(tmp_path, FakeStage(), Alerts(skip_share=0.2, samples_to_judge=10, stall_minutes=0.05), health=health)
    assert told(caplog) == []
