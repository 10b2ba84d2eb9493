from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import callbacks.token_throughput as module
from callbacks.batch_tally import BatchTally
from callbacks.token_throughput import StepClock, TokenThroughput, peak_flops
from lightning_echat.contracts import UserError
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer


class RecordingLogger(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append((step, dict(metrics)))

    def perf(self) -> list[tuple[int | None, dict[str, Any]]]:
        return [row for row in self.rows if any(key.startswith("perf/") for key in row[1])]


def test_a_tally_counts_padding_targets_and_speech_apart() -> None:
    tally = BatchTally()
    tally.add(make_batch(tokens=6, padding=2, supervised=3, frames=50))
    tally.add(make_batch(tokens=10, padding=6, supervised=1, frames=150))
    sums = tally.read()
    assert (sums.tokens, sums.positions, sums.supervised, sums.audio_seconds) == (16, 24, 4, 2.0)
    assert sums.padding_share == pytest.approx(8 / 24)


def test_the_clock_counts_waits_for_data_and_leaves_out_what_interrupted_them() -> None:
    clock = StepClock()
    clock.start_batch(100.0)  # What came before the first batch is unknown, so it is no wait.
    clock.end_batch(101.0)
    clock.start_batch(101.5)
    clock.end_batch(103.0)
    clock.interrupt()
    clock.start_batch(200.0)
    clock.end_batch(201.0)
    assert clock.waited == 0.5
    assert clock.elapsed == 1.0 + 0.5 + 1.5 + 1.0


def test_windows_log_rates_of_what_was_seen_after_the_first_batch(tmp_path: Path, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    # The first batch warms up: were it counted, its size would show.
    batches = [make_batch(tokens=1000)] + [make_batch(tokens=6, padding=2, supervised=3, frames=50) for _ in range(5)]
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, TokenThroughput(every_n_steps=2), logger=logger, max_steps=6)
    trainer.fit(FakeStage(), datamodule=FakeData(train=batches))
    # Every look at the clock is a second later: each step takes one second and waits one.
    expected = {
        "perf/steps_per_second": 0.5,
        "perf/tokens_per_second": 3.0,
        "perf/supervised_tokens_per_second": 1.5,
        "perf/audio_seconds_per_second": 0.25,
        "perf/padding_share": 0.25,
        "perf/data_wait_share": 0.5,
    }
    assert logger.perf() == [(3, expected), (5, expected)]


def test_micro_batches_of_one_step_all_count(tmp_path: Path, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(
        tmp_path, TokenThroughput(every_n_steps=1), logger=logger, accumulate_grad_batches=2, max_steps=2
    )
    trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch(tokens=6) for _ in range(4)]))
    # The window opens after the first micro-batch: one more ends step 1, two make step 2.
    assert [(step, row["perf/tokens_per_second"]) for step, row in logger.perf()] == [(1, 3.0), (2, 3.0)]
    assert logger.perf()[1][1]["perf/steps_per_second"] == 0.25


def test_utilisation_credits_measured_operations_to_ids_that_are_not_padding(tmp_path: Path, monkeypatch) -> None:
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(module, "peak_flops", lambda device, precision: 1000.0)
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, TokenThroughput(every_n_steps=1), logger=logger, max_steps=2)
    trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch(tokens=6, padding=2) for _ in range(2)]))
    # A 4 x 4 layer costs 2*16 operations a position forward and as many for the gradient of its weight.
    flops_per_position = 2 * 16 * 2
    assert logger.perf()[0][1]["perf/mfu"] == pytest.approx(6 * flops_per_position / (2.0 * 1000.0))


def test_there_is_no_utilisation_without_a_known_peak(monkeypatch) -> None:
    assert peak_flops(torch.device("cpu"), precision="bf16-mixed") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), precision="bf16-true") == 989e12
    assert peak_flops(torch.device("cuda"), precision="32-true") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert peak_flops(torch.device("cuda"), precision="bf16-true") == 756e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard Of 1")
    assert peak_flops(torch.device("cuda"), precision="bf16-true") is None


def test_a_window_needs_a_step() -> None:
    with pytest.raises(UserError, match="every_n_steps must be at least 1"):
        TokenThroughput(every_n_steps=0)
