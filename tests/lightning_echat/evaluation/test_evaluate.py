"""A tiny model answers dummy sets; what is stored is not asked again."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.decoding import DecodingConfig
from lightning_echat.evaluation import answering
from lightning_echat.evaluation.answering import QuestionConfig
from lightning_echat.evaluation.evaluate import evaluate
from lightning_echat.evaluation.item_sets import EvaluationSet
from lightning_echat.evaluation.records import read_records
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from lightning_echat.testing import CODEBOOK_SIZE, save_tiny_checkpoint, tiny_model, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig

QUESTIONS = QuestionConfig(
    batch=3,
    thinking="none",
    audio_items=2,
    controls=("text_only",),
    decoding=DecodingConfig(max_text_ids=8, max_speech_ids=20),
)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory, tokens) -> TokensConfig:
    torch.manual_seed(0)
    folder = Path(tmp_path_factory.mktemp("voice"))
    fit_kmeans(log_mel_blocks(0.1 * torch.randn(6 * SAMPLE_RATE)), codebook_size=CODEBOOK_SIZE).save(folder)
    return replace(tokens, speech_tokenizer=str(folder))


@pytest.fixture
def checkpoint(tmp_path, speaking) -> Path:
    return save_tiny_checkpoint(tmp_path / "last.ckpt", tiny_model(speaking), speaking)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[EvaluationSet]:
    folders = [Path(tmp_path_factory.mktemp("shards")) for _ in range(2)]
    write_dummy_shards(folders[0], shards=1, samples_per_shard=5)
    write_dummy_shards(folders[1], shards=1, samples_per_shard=2, first=50)
    names = ("held-out voices", "held-out types")
    return [EvaluationSet(name=name, shards=[str(folder)]) for name, folder in zip(names, folders, strict=True)]


@pytest.fixture
def generated(monkeypatch) -> list[list[str]]:
    """Keys of each batch that is answered."""
    batches: list[list[str]] = []
    generate = answering.generate

    def counted(model, batch, *args):
        batches.append([reference.key for reference in batch.references])
        return generate(model, batch, *args)

    monkeypatch.setattr(answering, "generate", counted)
    return batches


def report_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in ("seconds", "evaluation_seconds", "machine")}


def test_the_report_has_every_section(tmp_path, checkpoint, sets):
    out = tmp_path / "run"
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    report = report_of(out)
    assert {
        "seconds",
        "machine",
        "versions",
        "stages",
        "understanding",
        "thinking",
        "empathy",
        "speech",
        "data",
    } <= set(report)
    understanding = report["understanding"]
    assert (understanding["set"], understanding["items"]) == ("held-out voices", 5)
    assert understanding["other_sets"]["held-out types"]["items"] == 2
    for figure in ("accuracy", "majority_baseline", "confusion"):
        assert set(understanding[figure]) == {"age", "gender", "emotion", "event"}
    assert understanding["wer"] > 0 and 0 < understanding["majority_baseline"]["gender"] <= 1
    assert {"parse_rate", "accuracy"} <= set(report["thinking"])
    empathy = report["empathy"]
    assert empathy["judge"].startswith("rubric/") and empathy["items"] == 5
    assert all(len(empathy[category]) == 3 for category in ("emotion", "age", "gender", "event", "multi"))
    assert empathy["controls"]["text_only"]["items"] == 5
    # An untrained model ends its text at once and its speech never: a boundary and 19 codes.
    assert report["speech"]["replies"] == 5 and report["speech"]["speech_codes"] == 5 * 19
    assert report["speech"]["seconds_of_audio"] == pytest.approx(19 / 25)
    assert {"samples", "skipped", "padding_share"} <= set(report["data"])
    assert report["checkpoint"]["step"] == 7
    names = ("dialogues", "text_only", "understanding-held-out_types", "understanding-held-out_voices")
    assert sorted(path.stem for path in (out / "evaluation").glob("*.jsonl")) == sorted(names)


def test_answers_are_stored_with_some_of_their_sound(tmp_path, checkpoint, sets):
    evaluate(checkpoint, sets[:1], tmp_path, questions=QUESTIONS)
    records = read_records(tmp_path / "evaluation" / "dialogues.jsonl")
    assert [record.item.key for record in records] == [f"dialogue-{number:06d}" for number in range(5)]
    assert all(record.score is not None and record.judge for record in records)
    # One in sixteen is kept, beginning with the first.
    assert [record.reply_audio is not None for record in records] == [True, False, False, False, False]
    first = records[0]
    assert first.query_audio and first.reply_audio
    assert soundfile.info(tmp_path / "evaluation" / first.reply_audio).frames == 19 * 640
    assert first.query_seconds == pytest.approx(soundfile.info(tmp_path / "evaluation" / first.query_audio).duration)


def test_a_second_run_asks_nothing_again(tmp_path, checkpoint, sets, generated):
    out = tmp_path / "run"
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    # Two batches of the first set for each of three questions, one of the second.
    assert len(generated) == 7
    before, files = report_of(out), _contents(out)
    generated.clear()
    evaluate(checkpoint, sets, out, questions=QUESTIONS)
    assert generated == []
    assert timeless(report_of(out)) == timeless(before)
    assert _contents(out) == files


def test_another_checkpoint_is_asked_anew(tmp_path, checkpoint, sets, speaking, generated):
    out = tmp_path / "run"
    evaluate(checkpoint, sets[:1], out, questions=QUESTIONS)
    generated.clear()
    save_tiny_checkpoint(checkpoint, tiny_model(speaking, seed=1), speaking)
    evaluate(checkpoint, sets[:1], out, questions=QUESTIONS)
    assert len(generated) == 6
    generated.clear()
    evaluate(checkpoint, sets[:1], out, questions=replace(QUESTIONS, decoding=DecodingConfig(max_text_ids=4)))
    assert len(generated) == 6


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, checkpoint, sets, generated, monkeypatch):
    whole = tmp_path / "whole"
    evaluate(checkpoint, sets[:1], whole, questions=QUESTIONS)
    generated.clear()
    counted = answering.generate

    def interrupted(*args):
        if len(generated) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(answering, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, sets[:1], tmp_path / "run", questions=QUESTIONS)
    assert not (tmp_path / "run" / "report.json").exists()
    generated.clear()
    monkeypatch.setattr(answering, "generate", counted)
    evaluate(checkpoint, sets[:1], tmp_path / "run", questions=QUESTIONS)
    # The second half of the dialogues, and the control.
    assert len(generated) == 3
    found, expected = (read_records(folder / "evaluation" / "dialogues.jsonl") for folder in (tmp_path / "run", whole))
    strip = [replace(record, timings={}) for record in found]
    assert strip == [replace(record, timings={}) for record in expected]


def test_what_stages_and_data_left_joins_the_report(tmp_path, checkpoint, sets):
    for age, (name, padding) in enumerate((("understanding", 0.5), ("empathy", 0.1))):
        folder = tmp_path / name
        folder.mkdir()
        summary = {"seconds": 10.0, "steps": 5, "loss_first": 6.0, "loss_last": 2.0, "more": 1}
        health = {"samples": 100, "skipped": {"no turns": 2}, "positions": 1000 * (age + 1), "padding_share": padding}
        (folder / "stage_summary.json").write_text(json.dumps(summary))
        (folder / "data_health.json").write_text(json.dumps(health))
        os.utime(folder / "stage_summary.json", (1000 + age, 1000 + age))
    evaluate(checkpoint, sets[:1], tmp_path, questions=QUESTIONS)
    report = report_of(tmp_path)
    assert list(report["stages"]) == ["understanding", "empathy"]
    assert report["stages"]["empathy"] == {"seconds": 10.0, "steps": 5, "loss_first": 6.0, "loss_last": 2.0}
    assert report["data"]["samples"] == 200 and report["data"]["skipped"] == {"no turns": 4}
    assert report["data"]["padding_share"] == pytest.approx(700 / 3000)
    assert report["seconds"] >= 20


def test_sets_must_be_given_and_told_apart(tmp_path, checkpoint, sets):
    with pytest.raises(UserError, match="no evaluation set"):
        evaluate(checkpoint, [], tmp_path, questions=QUESTIONS)
    twins = [sets[0], replace(sets[1], name="held-out/voices")]
    with pytest.raises(UserError, match="two evaluation sets"):
        evaluate(checkpoint, twins, tmp_path, questions=QUESTIONS)


def _contents(out: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted((out / "evaluation").rglob("*")) if path.is_file()}
