"""ParalinguisticAccuracy and EmpathyEvaluation in a real Trainer, on a stage that answers by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy, draw_confusion
from lightning_echat.contracts import DialogueReference, UserError
from lightning_echat.evaluation.rubric import RubricJudge
from lightning_echat.metrics import LabelAccuracy
from lightning_echat.tokens.thinking import write_label_thinking
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer, reference

LABELS = {"emotion": "sad", "age": "old", "gender": "female", "event": "cough"}
QUERY = "could you find a quiet cafe"
GOOD = "i am so sorry to hear you so sad, madam. take care of that cough. i know a quiet cafe"


def heard(key: str, **labels: str) -> DialogueReference:
    return reference(key, transcript=QUERY, labels=labels, asked_labels=tuple(labels))


def conversation(key: str) -> DialogueReference:
    return reference(key, task="speech_to_text.label_thinking", transcript=QUERY, labels=LABELS)


def understanding_data() -> FakeData:
    first = make_batch([heard("a", emotion="sad"), heard("b", emotion="happy")])
    second = make_batch([heard("c", emotion="sad")])
    return FakeData(
        train=[make_batch()], validation={"voices": [first, second], "types": [make_batch([heard("d", age="old")])]}
    )


TEXTS = {"a": f"{QUERY}<sad>", "b": "could you find a cafe<sad>", "c": QUERY, "d": f"{QUERY}<old>"}


def test_each_validation_set_gets_the_metrics_of_its_own_answers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ParalinguisticAccuracy())
    trainer.fit(FakeStage(TEXTS), datamodule=understanding_data())
    values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    assert values.pop("val/voices/wer") == pytest.approx(1 / 18)
    assert values.pop("val/voices/macro_f1/emotion") == pytest.approx(((2 * 1) / (2 + 2) + 0.0) / 2)
    assert values.pop("val/voices/majority_baseline/emotion") == pytest.approx(2 / 3)
    assert values.pop("val/voices/accuracy/emotion") == pytest.approx(1 / 3)
    assert values == {
        "val/types/wer": 0.0,
        "val/types/accuracy/age": 1.0,
        "val/types/macro_f1/age": 1.0,
        "val/types/majority_baseline/age": 1.0,
    }


def test_sanity_checking_neither_answers_nor_counts(tmp_path: Path) -> None:
    stage = FakeStage(TEXTS)
    trainer = make_trainer(tmp_path, ParalinguisticAccuracy(), EmpathyEvaluation(), num_sanity_val_steps=2, max_steps=0)
    trainer.fit(stage, datamodule=understanding_data())
    assert stage.answered == []


def test_no_more_batches_are_answered_than_asked_for_and_the_next_validation_starts_empty(tmp_path: Path) -> None:
    stage = FakeStage(TEXTS)
    data = understanding_data()
    trainer = make_trainer(tmp_path, ParalinguisticAccuracy(max_batches=1), max_epochs=2)
    trainer.fit(stage, datamodule=data)
    one_pass = [data.validation["voices"][0], data.validation["types"][0]]
    assert [batch.references[0].key for batch in stage.answered] == [b.references[0].key for b in one_pass] * 2
    # Two of two answers, one of them wrong; the second batch, all wrong, was not answered.
    assert float(trainer.callback_metrics["val/voices/accuracy/emotion"]) == 0.5


def test_thinking_is_scored_where_the_task_thinks(tmp_path: Path) -> None:
    texts = {"a": write_label_thinking(QUERY, LABELS, "comforting") + GOOD, "b": "i forgot to think"}
    data = FakeData(validation={"talk": [make_batch([conversation("a"), conversation("b")])]})
    trainer = make_trainer(tmp_path, ParalinguisticAccuracy())
    trainer.validate(FakeStage(texts), datamodule=data, verbose=False)
    values = trainer.callback_metrics
    assert float(values["val/talk/think_parse_rate"]) == 0.5
    assert float(values["val/talk/accuracy/event"]) == 0.5
    assert float(values["val/talk/wer"]) == 0.5


def test_replies_are_judged_without_their_thinking_and_averaged_by_category(tmp_path: Path) -> None:
    texts = {"a": write_label_thinking(QUERY, LABELS, "comforting") + GOOD, "b": "here is a quiet cafe"}
    empty = make_batch([])
    data = FakeData(
        validation={"talk": [make_batch([conversation("a")]), make_batch([conversation("b")]), empty], "asr": [empty]}
    )
    trainer = make_trainer(tmp_path, EmpathyEvaluation())
    trainer.validate(FakeStage(texts), datamodule=data, verbose=False)
    judge = RubricJudge()
    good, plain = (judge.score(QUERY, labels=LABELS, reply=text) for text in (GOOD, texts["b"]))
    assert good.total > plain.total
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert values.pop("val/talk/empathy/count") == 2
    assert values.pop("val/talk/empathy/mean") == pytest.approx((good.total + plain.total) / 2, rel=1e-5)
    assert set(values) == {f"val/talk/empathy/{c}" for c in ("emotion", "age", "gender", "event", "multi")}
    assert values["val/talk/empathy/event"] == pytest.approx(
        (good.by_category["event"] + plain.by_category["event"]) / 2, rel=1e-5
    )


def test_understanding_answers_are_not_judged_for_empathy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, EmpathyEvaluation())
    trainer.validate(FakeStage(TEXTS), datamodule=understanding_data(), verbose=False)
    assert trainer.callback_metrics == {}


@pytest.mark.parametrize("callback", [ParalinguisticAccuracy(), EmpathyEvaluation()])
def test_a_module_that_cannot_answer_is_refused_before_training(tmp_path: Path, callback) -> None:
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(UserError, match=f"{type(callback).__name__} needs a stage that answers, which BoringModel"):
        trainer.fit(BoringModel())


@pytest.mark.parametrize("kind", [ParalinguisticAccuracy, EmpathyEvaluation])
def test_zero_batches_are_refused_as_they_measure_nothing(kind) -> None:
    with pytest.raises(UserError, match="max_batches must be at least 1"):
        kind(max_batches=0)


def test_a_confusion_matrix_is_drawn_with_its_counts_as_ink() -> None:
    metric = LabelAccuracy("age")
    blank = draw_confusion(metric.compute()["confusion"] + 1, label_set="age")
    metric.update(["old", None], ["old", "child"])
    drawn = draw_confusion(metric.compute()["confusion"], label_set="age")
    assert drawn.ndim == 3 and drawn.shape[2] == 3 and drawn.dtype.name == "uint8"
    # "adult" occurs nowhere, so the picture is smaller than one of all labels.
    assert drawn.shape[0] < blank.shape[0]
    assert drawn.min() < 100
