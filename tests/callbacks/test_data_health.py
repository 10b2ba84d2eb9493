"""The counts of a run: what becomes of them where it breaks off."""

import json

import pytest
from torch import Tensor

from callbacks.data_health import DataHealth
from lightning_echat.contracts import PackedBatch
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer


class BreaksOff(FakeStage):
    """Fails at one of its batches."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        if batch_idx == self.at:
            raise RuntimeError("broken off")
        return super().training_step(batch, batch_idx)


class OddWindow(FakeStage):
    """Takes a step every three batches by itself, so that two of five are left without one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
        return loss


def test_a_window_that_was_broken_off_is_counted_when_it_comes_again(tmp_path):
    batches = [make_batch(health={"read": 10**number}) for number in range(6)]
    health = DataHealth(every_n_steps=1)
    first = make_trainer(tmp_path, health, accumulate_grad_batches=3)
    with pytest.raises(RuntimeError, match="broken off"):
        first.fit(BreaksOff(5), datamodule=FakeData(train=batches))
    state = health.state_dict()
    assert (state["totals"]["read"], state["totals"]["batches"]) == (111, 3)
    again = DataHealth(every_n_steps=1)
    again.load_state_dict(state)
    make_trainer(tmp_path, again, accumulate_grad_batches=3).fit(FakeStage(), datamodule=FakeData(train=batches[3:]))
    assert again.state_dict()["totals"]["read"] == 111_111


def test_a_last_window_without_a_step_is_reported_and_not_kept(tmp_path):
    batches = [make_batch(health={"read": 10**number}) for number in range(5)]
    health = DataHealth(every_n_steps=1)
    stage = OddWindow()
    make_trainer(tmp_path, health, accumulate_grad_batches=1).fit(stage, datamodule=FakeData(train=batches))
    report = json.loads((tmp_path / "data_health.json").read_text())
    assert (report["samples"], report["batches"], report["positions"], report["complete"]) == (11111, 5, 40, True)
    assert health.state_dict()["totals"]["read"] == 111
