"""What reaches W&B, read back from the log that an offline run writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

import callbacks.dialogue_panel as module
from callbacks.data_health import DataHealth
from callbacks.dialogue_panel import COLUMNS, DialoguePanel
from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from callbacks.run_provenance import RunProvenance
from callbacks.token_throughput import TokenThroughput
from lightning_echat.contracts import DialogueReference, DialogueSample, SampleRejected, Turn, UserError
from lightning_echat.data.query_audio import read_query_audio
from lightning_echat.data.writers import write_shard
from lightning_echat.evaluation.rubric import RubricJudge
from lightning_echat.tokens.thinking import write_label_thinking
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer, reference
from tests.wandb_log import OfflineRun, read_run

QUERY = "could you find a quiet cafe"
LABELS = {"emotion": "sad", "age": "old", "gender": "female", "event": "cough"}
REPLY = "i am so sorry, madam. take care of that cough. i know a quiet cafe"


def waveform(value: float, seconds: float = 0.5) -> Tensor:
    return torch.full((int(16_000 * seconds),), value)


def write_dialogues(path: Path) -> str:
    """One exchange, and a dialogue of two exchanges."""
    replied = Turn(role="assistant", text="yes", labels={"emotion": "calm"})
    single = DialogueSample(key="one", turns=[Turn(role="user", text=QUERY, audio=waveform(0.25)), replied])
    double = DialogueSample(
        key="two",
        turns=[
            Turn(role="user", text="a", audio=waveform(0.5)),
            replied,
            Turn(role="user", text="b", audio=waveform(-0.5)),
            replied,
        ],
    )
    write_shard(path, [double, single])
    return str(path)


def test_the_query_of_an_exchange_is_the_last_user_turn_up_to_it(tmp_path: Path) -> None:
    shard = write_dialogues(tmp_path / "shard-000000.tar")
    for key, value in (("one", 0.25), ("two", -0.5), ("two#1", 0.5), ("two#2", -0.5)):
        audio = read_query_audio(DialogueReference(key=key, task="speech_to_text", shard=shard))
        assert torch.allclose(audio, waveform(value), atol=1e-4), key


@pytest.mark.parametrize("key, shard", [("three", "shard-000000.tar"), ("one", "gone.tar")])
def test_a_query_that_is_gone_is_rejected_by_name(tmp_path: Path, key: str, shard: str) -> None:
    write_dialogues(tmp_path / "shard-000000.tar")
    with pytest.raises(SampleRejected, match=f"dialogue not found: {key} in .*{shard}"):
        read_query_audio(DialogueReference(key=key, task="speech_to_text", shard=str(tmp_path / shard)))


def test_a_panel_without_wandb_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, DialoguePanel())
    with pytest.raises(UserError, match="writes W&B tables; give"):
        trainer.fit(FakeStage(), datamodule=FakeData(train=[make_batch()]))


class EightKilohertz:
    """Turns a code into 320 samples of its value over ten."""

    sample_rate = 8_000

    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        return (codes.float() / 10).repeat_interleave(320)


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory) -> Iterator[OfflineRun]:
    """A fit of four steps with a validation after each two, logged offline by every callback that logs."""
    folder = tmp_path_factory.mktemp("run")
    shard = write_dialogues(folder / "shard-000000.tar")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_DATA_DIR": str(folder / ".wandb-data"),
            "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
            "WANDB_SILENT": "true",
        }.items():
            patch.setenv(name, value)
        patch.setattr(module, "load_token2wav", lambda folder: EightKilohertz())
        _fit(folder, shard)
    yield read_run(folder)


def _fit(folder: Path, shard: str) -> None:
    talk = {"task": "speech_to_speech.label_thinking", "transcript": QUERY, "labels": LABELS, "reply": "the reference"}
    validation = {
        "talk": [make_batch([reference("one", shard=shard, **talk), reference("gone", shard=shard, **talk)])],
        "asr": [make_batch([reference("two#1", shard=shard, task="transcribe", transcript="a")])],
    }
    texts = {"one": write_label_thinking(QUERY, LABELS, "comforting") + REPLY, "gone": "hm", "two#1": "a"}
    trainer = make_trainer(
        folder,
        ParalinguisticAccuracy(),
        EmpathyEvaluation(),
        DialoguePanel(every_n_validations=2, token2wav="codes"),
        TokenThroughput(every_n_steps=1),
        DataHealth(every_n_steps=2),
        RunProvenance(),
        logger=WandbLogger(save_dir=folder, project="test", resume="allow"),
        max_steps=6,
        val_check_interval=2,
    )
    health = {"read": 2, "kept": 1, "skipped/no turns": 1}
    trainer.fit(
        FakeStage(texts, codes={"one": torch.tensor([1, 2])}),
        datamodule=FakeData(train=[make_batch(health=dict(health)) for _ in range(6)], validation=validation),
    )
    wandb.finish()


def test_every_metric_reaches_the_log_under_its_name_and_step(offline_run: OfflineRun) -> None:
    expected = {
        "train/loss",
        "val/talk/accuracy/emotion",
        "val/talk/macro_f1/event",
        "val/talk/majority_baseline/age",
        "val/talk/wer",
        "val/asr/wer",
        "val/talk/think_parse_rate",
        "val/talk/empathy/emotion",
        "val/talk/empathy/multi",
        "val/talk/empathy/count",
        "perf/tokens_per_second",
        "perf/data_wait_share",
        "data/read",
        "data/skipped/no_turns",
    }
    logged = {key for row in offline_run.history for key in row}
    assert expected <= logged
    assert not [key for key in logged if key.startswith("val/asr/empathy")]
    assert [value for _, value in offline_run.series("val/talk/think_parse_rate")] == [0.5, 0.5, 0.5]
    # Lightning counts the steps before a validation from 0; ours are steps done.
    assert [step for step, _ in offline_run.series("val/talk/wer")] == [1, 3, 5]
    assert [step for step, _ in offline_run.series("perf/steps_per_second")] == [2, 3, 4, 5, 6]
    assert offline_run.series("data/read")[:2] == [(2, 4), (4, 8)]


def test_confusion_matrices_are_images(offline_run: OfflineRun) -> None:
    series = offline_run.series("val/talk/confusion/emotion")
    assert [step for step, _ in series] == [2, 4, 6]
    assert series[0][1]["_type"] == "images/separated"


def test_a_table_row_can_be_read_and_heard(offline_run: OfflineRun) -> None:
    # Three validations: the first and the third have a table.
    assert [step for step, _ in offline_run.series("val/talk/dialogues")] == [2, 6]
    table, files = offline_run.table("val/talk/dialogues")
    assert table["columns"] == COLUMNS
    row, lost = (dict(zip(COLUMNS, row, strict=True)) for row in table["data"])
    assert (row["key"], row["transcript"], row["heard words"], row["reply"]) == ("one", QUERY, QUERY, REPLY)
    assert row["labels"] == row["heard labels"] == "age: old, gender: female, emotion: sad, event: cough"
    assert row["thinking"].startswith("words: could you") and "<think" not in row["thinking"]
    assert row["score"] == RubricJudge().score(QUERY, labels=LABELS, reply=REPLY).total > 50
    query, rate = soundfile.read(files[row["query"]["path"]])
    assert rate == 16_000 and query.shape == (8_000,) and query[0] == pytest.approx(0.25, abs=1e-3)
    spoken, rate = soundfile.read(files[row["reply audio"]["path"]])
    assert rate == 8_000 and spoken.shape == (640,) and spoken[-1] == pytest.approx(0.2, abs=1e-3)
    assert row["query"]["caption"] == QUERY and row["reply audio"]["caption"] == REPLY
    # A dialogue whose shard no longer holds it keeps its row.
    assert (lost["key"], lost["query"], lost["reply audio"], lost["reply"]) == ("gone", None, None, "hm")


def test_an_understanding_set_has_a_table_without_scores(offline_run: OfflineRun) -> None:
    table, files = offline_run.table("val/asr/dialogues")
    (row,) = (dict(zip(COLUMNS, row, strict=True)) for row in table["data"])
    assert row["heard words"] == "a" and row["reply"] == "" and row["score"] is None
    query, _ = soundfile.read(files[row["query"]["path"]])
    assert query[0] == pytest.approx(0.5, abs=1e-3)


def test_provenance_is_part_of_the_configuration(offline_run: OfflineRun) -> None:
    assert offline_run.config["provenance"]["packages"]["lightning-echat"]
