"""`echat test` and `echat predict` in a real Trainer: a set of their own, every dialogue once, everything answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from callbacks.prediction_writer import PredictionWriter
from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.contracts import UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.decoding import DecodingConfig
from lightning_echat.testing import tiny_tokens_config, write_dummy_shards
from lightning_echat.tokens.dialogue_template import TokensConfig
from tests.tiny_training import make_stage, make_trainer

DECODING = DecodingConfig(max_text_ids=12, max_speech_ids=6)


@pytest.fixture
def tokens(tmp_path: Path) -> TokensConfig:
    return tiny_tokens_config(tmp_path / "tokenizer")


def task_set(folder: Path, kind: str = "transcribe_and_label") -> SourceConfig:
    labels = {"labels": ("age", "emotion")} if kind == "transcribe_and_label" else {}
    return SourceConfig(shards=[str(folder)], tasks=[TaskConfig(kind=kind, **labels)])  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path, tokens: TokensConfig) -> SpokenDialogueDataModule:
    for name, samples in (("validation", 3), ("test", 5)):
        write_dummy_shards(tmp_path / name, shards=1, samples_per_shard=samples)
    return SpokenDialogueDataModule(
        tokens=tokens,
        validation={"seen": task_set(tmp_path / "validation")},
        test={"words": task_set(tmp_path / "test"), "talk": task_set(tmp_path / "test", "speech_to_speech")},
        batching=BatchingConfig(validation_rows=2),
        num_workers=0,
    )


def test_a_test_measures_its_own_sets_whole_as_a_validation_would(tmp_path, tokens, data):
    stage = make_stage(tokens, decoding=DECODING)
    accuracy = ParalinguisticAccuracy(max_batches=1)
    counted = []
    accuracy._add = lambda stage, replies, *, key, add=accuracy._add: (  # type: ignore[method-assign]
        counted.extend((key, reply.reference.key) for reply in replies),
        add(stage, replies, key=key),
    )
    trainer = make_trainer(tmp_path, accuracy)
    figures = {name: value for values in trainer.test(stage, data, verbose=False) for name, value in values.items()}
    assert {name for name, _ in counted} == {"test/words", "test/talk"}
    # Five dialogues in three batches, of which a validation would have answered one.
    assert len([key for name, key in counted if name == "test/words"]) == 5
    assert "test/words/wer" in figures and not any(name.startswith("val/") for name in figures)
    data.validation = data.test
    validated = {n: v for values in trainer.validate(stage, data, verbose=False) for n, v in values.items()}
    for loss in ("words/loss/text", "talk/loss/text", "talk/loss/speech"):
        assert figures[f"test/{loss}"] == pytest.approx(validated[f"val/{loss}"], rel=1e-6)


def test_a_prediction_writes_every_answer_once(tmp_path, tokens, data):
    stage = make_stage(tokens, decoding=DECODING)
    trainer = make_trainer(tmp_path, PredictionWriter())
    answers = trainer.predict(stage, data)
    assert answers is not None
    lines = {
        name: [json.loads(line) for line in (tmp_path / f"predictions/{name}-00000-of-00001.jsonl").open()]
        for name in ("words", "talk")
    }
    assert sorted(line["key"] for line in lines["words"]) == [f"dialogue-{number:06d}" for number in range(5)]
    given = [reply for batch in answers[1] for reply in batch]
    assert [(line["text"], line["speech_codes"]) for line in lines["talk"]] == [
        (reply.text, reply.speech_codes.tolist()) for reply in given
    ]
    assert {line["task"] for line in lines["talk"]} == {"speech_to_speech"}
    assert list(tmp_path.glob("predictions/*.partial")) == []


def test_an_interrupted_prediction_leaves_no_file_that_looks_complete(tmp_path, tokens, data, monkeypatch):
    stage = make_stage(tokens, decoding=DECODING)
    answer, asked = stage.answers, []

    def answer_once(batch):
        asked.append(batch)
        return answer(batch) if len(asked) == 1 else 1 / 0

    monkeypatch.setattr(stage, "answers", answer_once)
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, PredictionWriter()).predict(stage, data)
    assert [path.suffix for path in (tmp_path / "predictions").iterdir()] == [".partial"] * 2


def test_without_a_test_set_the_validation_sets_are_taken_and_without_any_that_is_said(tmp_path, tokens, data):
    same = {"validation": data.validation, "num_workers": 0}
    assert SpokenDialogueDataModule(tokens=tokens, **same).test_names == ["seen"]
    with pytest.raises(UserError, match=r"data\.test and data\.validation name no set"):
        SpokenDialogueDataModule(tokens=tokens).predict_dataloader()
