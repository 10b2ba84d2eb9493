"""What callbacks leave in the run's folder: data_health.json, stage_summary.json, provenance.json."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.data_health import DataHealth
from callbacks.run_provenance import RunProvenance, git_state, shard_list_hash
from callbacks.stage_summary import LossCurve, StageSummary
from lightning_echat.contracts import UserError
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer
from tests.callbacks.test_token_throughput import RecordingLogger

HEALTH = {"read": 3, "kept": 2, "skipped/no reply emotion": 1, "noticed/clipped audio": 1, "drawn/a/label": 2}


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


class FailingStage(FakeStage):
    """Fails after `good` training steps."""

    good = 2

    def training_step(self, batch, batch_idx):
        if self.global_step == self.good:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


def healthy_batches(count: int) -> list:
    return [make_batch(tokens=6, padding=2, health=dict(HEALTH)) for _ in range(count)]


def test_data_health_adds_up_what_travels_with_batches(tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    trainer = make_trainer(tmp_path, DataHealth(every_n_steps=2), logger=logger)
    trainer.fit(FakeStage(), datamodule=FakeData(train=healthy_batches(3)))
    assert read(tmp_path, "data_health.json") == {
        "samples": 9,
        "kept": 6,
        "skipped": {"no reply emotion": 3},
        "noticed": {"clipped audio": 3},
        "drawn": {"a/label": 6},
        "padding_share": 0.25,
        "positions": 24,
        "batches": 3,
        "complete": True,
    }
    logged = [(step, row) for step, row in logger.rows if "data/read" in row]
    assert logged[0] == (
        2,
        {
            "data/read": 6,
            "data/kept": 4,
            "data/skipped/no_reply_emotion": 2,
            "data/noticed/clipped_audio": 2,
            "data/drawn/a/label": 4,
        },
    )
    assert logged[-1][1]["data/read"] == 9


class MixedData(FakeData):
    """Two tasks, of which the second was asked for more than it was drawn."""

    mixture_by = "samples"
    asked_shares: ClassVar = {"a/label": 0.5, "a/transcribe": 0.5}
    epochs: ClassVar = {"a": 1.25}


@pytest.mark.parametrize(("unit", "share"), [("samples", 0.75), ("tokens", 0.6)])
def test_what_was_drawn_stands_beside_what_was_asked(tmp_path: Path, unit: str, share: float) -> None:
    """A mixture that drifts from its weights would otherwise go unseen."""
    health = {"drawn/a/label": 3, "drawn/a/transcribe": 1, "drawn_ids/a/label": 30, "drawn_ids/a/transcribe": 20}
    logger = RecordingLogger(tmp_path)
    data = MixedData(train=[make_batch(health=dict(health)) for _ in range(2)])
    data.mixture_by = unit
    make_trainer(tmp_path, DataHealth(every_n_steps=2), logger=logger).fit(FakeStage(), datamodule=data)
    row = next(row for _, row in logger.rows if "data/drawn/a/label" in row)
    assert row["data/drawn_share/a/label"] == pytest.approx(share)
    assert row["data/drawn_share/a/transcribe"] == pytest.approx(1 - share)
    assert (row["data/asked_share/a/label"], row["data/epochs/a"]) == (0.5, 1.25)
    assert read(tmp_path, "data_health.json")["drawn_share"]["a/label"] == pytest.approx(share)


def test_data_health_survives_an_error_and_says_that_it_is_not_complete(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DataHealth())
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(FailingStage(), datamodule=FakeData(train=healthy_batches(4)))
    health = read(tmp_path, "data_health.json")
    assert (health["samples"], health["batches"], health["complete"]) == (6, 2, False)


def test_a_resumed_run_goes_on_counting_and_timing(tmp_path: Path) -> None:
    def fit(max_steps: int, resume: str | None) -> None:
        saver = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=1, save_top_k=1, monitor=None)
        trainer = make_trainer(
            tmp_path, DataHealth(), StageSummary(), saver, max_steps=max_steps, max_epochs=-1, enable_checkpointing=True
        )
        trainer.fit(FakeStage(), datamodule=FakeData(train=healthy_batches(8)), ckpt_path=resume)

    fit(3, None)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    checkpoint["callbacks"]["StageSummary"]["seconds"] += 100.0
    torch.save(checkpoint, tmp_path / "last.ckpt")
    fit(5, str(tmp_path / "last.ckpt"))
    assert read(tmp_path, "data_health.json")["samples"] == 15
    summary = read(tmp_path, "stage_summary.json")
    assert [step for step, _ in summary["curve"]] == [1, 2, 3, 4, 5]
    assert 100.0 < summary["seconds"] < 160.0


def test_the_stage_summary_holds_steps_and_the_ends_of_the_curve(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, StageSummary(), max_steps=8)
    trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch() for _ in range(8)]))
    summary = read(tmp_path, "stage_summary.json")
    assert summary["steps"] == 8 and summary["complete"]
    assert (summary["loss_first"], summary["loss_last"]) == (8.0, 1.0)
    assert summary["curve"] == [[step, 9.0 - step] for step in range(1, 9)]


def test_the_stage_summary_takes_one_loss_a_step_however_many_micro_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, StageSummary(), accumulate_grad_batches=3)
    trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch() for _ in range(9)]))
    assert [step for step, _ in read(tmp_path, "stage_summary.json")["curve"]] == [1, 2, 3]


def test_a_failed_stage_leaves_what_it_had(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, StageSummary())
    with pytest.raises(RuntimeError):
        trainer.fit(FailingStage(), datamodule=FakeData(train=[make_batch() for _ in range(4)]))
    summary = read(tmp_path, "stage_summary.json")
    assert (summary["steps"], summary["complete"], summary["loss_last"]) == (2, False, 7.0)


def test_a_stage_that_logs_no_such_loss_is_named_with_what_it_logs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, StageSummary(metric="train/other"))
    with pytest.raises(UserError, match="'train/other', which FakeStage does not log; it logs train/loss"):
        trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch()]))


def test_a_long_curve_keeps_its_means_in_bounded_memory() -> None:
    curve = LossCurve()
    for step in range(1, 5001):
        curve.add(step, float(step))
    assert len(curve.buckets) <= LossCurve.MAX_BUCKETS
    assert sum(bucket[2] for bucket in curve.buckets) == 5000
    assert sum(bucket[1] for bucket in curve.buckets) == sum(range(1, 5001))
    steps = [step for step, _ in curve.points()]
    assert steps == sorted(steps) and steps[-1] == 5000
    assert curve.first(0.01) == pytest.approx(25.0, rel=0.1)
    assert curve.last(0.05) == pytest.approx(4875.0, rel=0.01)


def test_a_curve_does_not_hide_that_a_loss_was_no_number() -> None:
    curve = LossCurve()
    curve.add(1, float("nan"))
    assert curve.first(0.01) != curve.first(0.01)


def test_provenance_names_config_code_packages_data_and_seed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(b"12345")
    data = FakeData(train=[make_batch()])
    data.train = [SourceConfig(shards=[str(shard)], tasks=[TaskConfig(kind="transcribe")])]  # type: ignore[attr-defined]
    trainer = make_trainer(tmp_path, RunProvenance(), max_steps=1)
    trainer.fit(FakeStage(), datamodule=data)
    record = read(tmp_path, "provenance.json")
    assert record["config_sha256"] == hashlib.sha256(b"a: 1\n").hexdigest()
    assert record["shards"] == {"count": 1, "sha256": shard_list_hash([str(shard)])}
    assert record["seed"] == 7 and record["world_size"] == 1
    assert record["packages"]["torch"].startswith("2.")
    assert record["command"] and record["machine"]["cpu_cores"] >= 1


def test_what_provenance_cannot_know_is_null(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    make_trainer(tmp_path, RunProvenance(), max_steps=1).fit(FakeStage(), datamodule=FakeData(train=[make_batch()]))
    record = read(tmp_path, "provenance.json")
    assert record["config_sha256"] is None and record["shards"] is None and record["seed"] is None


def test_the_shard_hash_changes_with_content_size_and_order_but_not_with_the_folder(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, size in (("0.tar", 3), ("1.tar", 4)):
            path = tmp_path / folder / name
            path.write_bytes(b"x" * size)
            paths.append(str(path))
    first = shard_list_hash(paths[:2])
    assert shard_list_hash(paths[2:]) == first
    assert shard_list_hash(paths[1::-1]) != first
    Path(paths[0]).write_bytes(b"xxxxx")
    assert shard_list_hash(paths[:2]) != first


def test_git_state_tells_commit_and_edits_and_ignores_a_repository_that_does_not_track_the_file(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    file, stranger = tmp_path / "a.py", tmp_path / "b.py"
    file.write_text("1")
    git("add", "a.py")
    git("commit", "-m", "one")
    assert git_state(file) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    stranger.write_text("2")
    assert git_state(stranger) is None
    state = git_state(file)
    assert state is not None and state["dirty"]
