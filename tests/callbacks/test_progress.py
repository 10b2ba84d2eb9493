from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

import callbacks.progress as module
from callbacks.progress import ProgressBar
from lightning_echat.contracts import UserError
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer


def fit(folder: Path, bar: ProgressBar, **options) -> None:
    data = FakeData(train=[make_batch(tokens=6) for _ in range(4)], validation={"a": [make_batch(), make_batch()]})
    trainer = make_trainer(folder / "understanding", bar, enable_progress_bar=True, **options)
    trainer.fit(FakeStage(), datamodule=data)


def test_a_pipe_gets_plain_lines_with_stage_step_loss_speed_and_time_left(tmp_path: Path, capsys, monkeypatch) -> None:
    clock = iter(range(0, 100_000, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    fit(tmp_path, ProgressBar(seconds_between_lines=3.0), max_steps=4)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"understanding  step 1/4  loss 8\.000  2 tokens/s  eta 0:00:\d\d", lines[0])
    assert lines[3].startswith("understanding  step 4/4") and lines[3].endswith("eta 0:00:00")
    assert lines[4] == "understanding  validating set 1, batch 1"


def test_a_quiet_pipe_still_gets_the_last_line(tmp_path: Path, capsys) -> None:
    fit(tmp_path, ProgressBar(seconds_between_lines=3600), max_steps=4)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("understanding  step 4/4  loss 5.000")


def test_without_a_last_step_the_line_says_how_long_it_has_been(tmp_path: Path, capsys) -> None:
    fit(tmp_path, ProgressBar(seconds_between_lines=1e-9), max_epochs=1)
    assert re.search(r"step 2  loss 7\.000  \d+ tokens/s  0:00:0\d gone", capsys.readouterr().out)


def test_a_terminal_gets_the_bar_and_no_plain_lines(tmp_path: Path, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    bar = ProgressBar(seconds_between_lines=1e-9)
    fit(tmp_path, bar, max_steps=4)
    assert bar.is_enabled
    assert "understanding  step" not in terminal.getvalue()


def test_lines_need_time_between_them() -> None:
    with pytest.raises(UserError, match="must be positive"):
        ProgressBar(seconds_between_lines=0)
