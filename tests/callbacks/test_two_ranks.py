"""Every callback that reduces, on two processes that hold different things, one of them at times nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks.data_health import DataHealth
from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from callbacks.stage_summary import StageSummary
from callbacks.token_throughput import TokenThroughput
from lightning_echat.contracts import PackedBatch
from lightning_echat.evaluation.rubric import RubricJudge
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer, reference

QUERY = "could you find a quiet cafe"


class RankedData(FakeData):
    """Rank 0 trains on little data and validates on three dialogues; rank 1 on much and on one."""

    def __init__(self) -> None:
        super().__init__(validation={"asr": [], "talk": []})

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        rank = self._rank()
        health = {"read": 1 + rank, "kept": 1, **({"skipped/no turns": 1} if rank else {})}
        batches = [make_batch(tokens=4 + 8 * rank, padding=4, health=dict(health)) for _ in range(3)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> list[DataLoader[PackedBatch]]:
        def heard(key: str) -> PackedBatch:
            asked = {"transcript": QUERY, "labels": {"emotion": "sad"}, "asked_labels": ("emotion",)}
            return make_batch([reference(key, **asked)])

        spoken = reference("cough", task="speech_to_text", transcript=QUERY, labels={"event": "cough"})
        empty = make_batch([])
        sets = (
            [[heard("a"), heard("b")], [empty]] if self._rank() == 0 else [[heard("c"), empty], [make_batch([spoken])]]
        )
        return [DataLoader(batches, batch_size=None) for batches in sets]  # type: ignore[arg-type]

    def _rank(self) -> int:
        assert self.trainer is not None
        return self.trainer.global_rank


def test_two_ranks_report_the_figures_of_all_their_data(tmp_path: Path) -> None:
    """A rank that leaves out a collective hangs here; a mean of ranks' means differs."""
    texts = {"a": f"{QUERY}<sad>", "b": "<happy>", "c": f"{QUERY}<sad>", "cough": "a quiet cafe. bless you"}
    trainer = make_trainer(
        tmp_path,
        ParalinguisticAccuracy(),
        EmpathyEvaluation(),
        DataHealth(every_n_steps=1),
        TokenThroughput(every_n_steps=1),
        StageSummary(),
        logger=CSVLogger(tmp_path, name="", version="metrics"),
        strategy="ddp_spawn",
        devices=2,
        use_distributed_sampler=False,
    )
    trainer.fit(FakeStage(texts), datamodule=RankedData())
    values = trainer.callback_metrics
    assert float(values["val/asr/accuracy/emotion"]) == pytest.approx(2 / 3)
    assert float(values["val/asr/wer"]) == pytest.approx(6 / 18)
    judged = RubricJudge().score(QUERY, labels={"event": "cough"}, reply=texts["cough"]).total
    assert float(values["val/talk/empathy/mean"]) == pytest.approx(judged)
    assert float(values["val/talk/empathy/count"]) == 1

    health = json.loads((tmp_path / "data_health.json").read_text())
    assert (health["samples"], health["kept"], health["skipped"]) == (9, 6, {"no turns": 3})
    assert health["padding_share"] == pytest.approx(24 / 72) and health["batches"] == 6
    assert json.loads((tmp_path / "stage_summary.json").read_text())["steps"] == 3

    with (tmp_path / "metrics" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["perf/tokens_per_second"]]
    # 16 tokens a step on both ranks together.
    assert len(rows) == 2
    for row in rows:
        ratio = float(row["perf/tokens_per_second"]) / float(row["perf/steps_per_second"])
        assert ratio == pytest.approx(16)
