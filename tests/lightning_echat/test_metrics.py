from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchmetrics.classification import MulticlassF1Score

from lightning_echat.contracts import DialogueReference, GeneratedReply
from lightning_echat.metrics import (
    EnglishWordErrorRate,
    LabelAccuracy,
    MeanTokenLoss,
    ParsedAnswer,
    ThinkingParseRate,
    UnderstandingMetrics,
    normalize_english,
    parse_answer,
)
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.thinking import write_label_thinking, write_natural_thinking


def reply(text: str, *, task: str, **fields) -> GeneratedReply:
    return GeneratedReply(reference=DialogueReference(key="k", task=task, **fields), text_ids=[], text=text)


def test_normalisation_drops_case_and_punctuation_and_closes_apostrophes() -> None:
    assert normalize_english("Don’t you,  “know” me-and_him?") == "dont you know me and him"


def test_an_understanding_answer_is_words_and_the_tags_that_were_asked_for() -> None:
    answer = parse_answer(reply("where is it<sad><old>", task="transcribe_and_label", asked_labels=("emotion", "age")))
    assert answer.transcribes and not answer.thinks
    assert answer.transcript == "where is it"
    assert answer.labels == {"emotion": "sad", "age": "old"}


def test_a_labelling_answer_has_no_transcript_to_be_judged_by() -> None:
    answer = parse_answer(reply("<sad>", task="label", asked_labels=("emotion",)))
    assert not answer.transcribes and answer.transcript is None
    assert answer.labels == {"emotion": "sad"}


@pytest.mark.parametrize("form", ["label", "natural"])
def test_a_thoughtful_answer_is_read_in_either_form(form: str) -> None:
    labels = {"age": "old", "gender": "female", "emotion": "sad", "event": "cough"}
    if form == "label":
        text = write_label_thinking("where is it", labels, "comforting")
    else:
        text = f"<think>{write_natural_thinking('where is it', labels, 'comforting')}<think end>"
    answer = parse_answer(
        reply(f"{text}i am sorry", task=f"speech_to_speech.{form}_thinking.interleaved", labels=labels)
    )
    assert answer.thinks and answer.well_formed and answer.transcribes
    assert set(answer.asked_labels) == set(labels)
    assert (answer.transcript, answer.labels, answer.reply_emotion) == ("where is it", labels, "comforting")
    assert answer.reply == "i am sorry"


def test_an_answer_without_thinking_is_a_reply_and_asks_nothing_else() -> None:
    answer = parse_answer(reply(" hello ", task="speech_to_text", labels={"emotion": "sad"}))
    assert answer == ParsedAnswer(reply="hello")


def test_confusions_hold_every_answer_at_its_place_and_unparsed_ones_in_the_last_column() -> None:
    metric = LabelAccuracy("age")
    metric.update(["child", "old", None, "old"], ["child", "adult", "adult", "old"])
    assert metric.compute()["confusion"].tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]


def test_an_unparsed_answer_is_a_wrong_answer() -> None:
    metric = LabelAccuracy("gender")
    metric.update(["male", None, None, None], ["male"] * 4)
    scores = metric.compute()
    assert float(scores["accuracy"]) == 0.25
    # Precision 1, recall 1/4.
    assert float(scores["macro_f1"]) == pytest.approx(0.4)
    assert float(scores["majority_baseline"]) == 1.0


def test_macro_f1_is_that_of_torchmetrics_where_everything_is_parsed() -> None:
    generator = torch.Generator().manual_seed(0)
    truths = torch.randint(0, 5, (200,), generator=generator)
    answers = torch.where(
        torch.rand(200, generator=generator) < 0.6, truths, torch.randint(0, 5, (200,), generator=generator)
    )
    names = LABEL_SETS["emotion"]
    metric = LabelAccuracy("emotion")
    metric.update([names[i] for i in answers], [names[i] for i in truths])
    expected = MulticlassF1Score(num_classes=len(names), average="macro")(answers, truths)
    assert float(metric.compute()["macro_f1"]) == pytest.approx(float(expected), abs=1e-6)


def test_word_errors_are_counted_on_normalised_words() -> None:
    metric = EnglishWordErrorRate()
    metric.update(["Where, is it?", "a b"], ["where is it", "a c d"])
    assert float(metric.compute()) == pytest.approx(2 / 6)


def test_a_missing_transcript_is_all_deletions() -> None:
    metrics = UnderstandingMetrics()
    metrics.update([DialogueReference(key="k", task="x", transcript="one two")], [ParsedAnswer(transcribes=True)])
    assert metrics.compute()["wer"] == 1.0


def test_thinking_that_cannot_be_read_has_deleted_every_word_and_the_parse_rate_beside_it_tells() -> None:
    asked = DialogueReference(key="k", task="speech_to_text.label_thinking", transcript="one two", labels={})
    unread = GeneratedReply(
        reference=asked, text_ids=[], text="la la la", speech_codes=torch.zeros(0), finished=True, timings={}
    )
    metrics = UnderstandingMetrics()
    metrics.update([asked], [parse_answer(unread)])
    assert metrics.compute() == {"wer": 1.0, "think_parse_rate": 0.0}


def test_what_has_no_data_is_absent_and_not_zero() -> None:
    metrics = UnderstandingMetrics()
    labels = {"emotion": "sad", "age": "old"}
    asked = DialogueReference(key="k", task="label", labels=labels, asked_labels=("emotion",))
    metrics.update([asked], [ParsedAnswer(asked_labels=("emotion",), labels={"emotion": "sad"})])
    assert metrics.compute() == {"accuracy/emotion": 1.0, "macro_f1/emotion": 1.0, "majority_baseline/emotion": 1.0}
    assert list(metrics.confusions()) == ["emotion"]
    empty = MeanTokenLoss()
    empty.update(0.0, 0)
    assert math.isnan(float(empty.compute()))


def test_thinking_that_cannot_be_read_lowers_rate_accuracy_and_words_alike() -> None:
    labels = {"emotion": "sad"}
    good = reply(
        write_label_thinking("a b", labels, "calm") + "ok", task="speech_to_text.label_thinking", labels=labels
    )
    bad = reply("<think>words: a b ; emotion: <sad", task="speech_to_text.label_thinking", labels=labels)
    lost = reply("ok", task="speech_to_text.label_thinking", labels=labels)
    for answer in (good, bad, lost):
        answer.reference.transcript = "a b"
    metrics = UnderstandingMetrics()
    metrics.update([r.reference for r in (good, bad, lost)], [parse_answer(r) for r in (good, bad, lost)])
    values = metrics.compute()
    assert values["think_parse_rate"] == pytest.approx(1 / 3)
    assert values["accuracy/emotion"] == pytest.approx(2 / 3)  # The cut-off tag is still a label.
    assert values["wer"] == pytest.approx(2 / 6)


def test_mean_loss_weighs_batches_by_their_tokens() -> None:
    loss = MeanTokenLoss()
    loss.update(torch.tensor(10.0), torch.tensor(1))
    loss.update(torch.tensor(10.0, requires_grad=True), 9)
    assert float(loss.compute()) == 2.0


def test_sums_stay_exact_inside_a_module_cast_to_bfloat16() -> None:
    module = nn.ModuleDict({"loss": MeanTokenLoss(), "words": EnglishWordErrorRate()}).to(torch.bfloat16)
    loss = module["loss"]
    for _ in range(1000):
        loss.update(torch.tensor(1.0, dtype=torch.bfloat16), 1)  # type: ignore[operator]
    # A bfloat16 sum of ones stops at 256.
    assert float(loss.compute()) == 1.0  # type: ignore[operator]
    assert module["words"].errors.dtype == torch.float32
    loss.reset()  # type: ignore[operator]
    assert loss.part.dtype == torch.float64


def _answers(rank: int) -> tuple[list[DialogueReference], list[ParsedAnswer]]:
    """Rank 0 holds five answers of two kinds, rank 1 one answer of another kind."""
    if rank == 1:
        thought = DialogueReference(key="t", task="x", transcript="a b c", labels={"event": "cough"})
        answer = ParsedAnswer(
            transcribes=True, thinks=True, asked_labels=("event",), transcript="a b", labels={"event": "cough"}
        )
        return [thought], [answer]
    asked = [DialogueReference(key=str(i), task="label", labels={"emotion": "sad"}) for i in range(5)]
    said = ["sad", "sad", "happy", None, "sad"]
    answers = [ParsedAnswer(asked_labels=("emotion",), labels={"emotion": s} if s else {}) for s in said]
    return asked, answers


def _reduce_on(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    metrics, loss, rate = UnderstandingMetrics(), MeanTokenLoss(), ThinkingParseRate()
    metrics.update(*_answers(rank))
    for _ in range(3 if rank == 0 else 0):
        loss.update(1.0, 4)
    loss.update(9.0, 2) if rank == 1 else loss.update(0.0, 0)
    rate.update([])
    result = (metrics.compute(), {k: v.tolist() for k, v in metrics.confusions().items()}, float(loss.compute()))
    torch.save((*result, float(rate.compute())), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_unequal_batches_agree_on_the_values_of_one_big_batch(tmp_path: Path) -> None:
    """A mean of means, or a rank that skips a collective because it holds nothing, fails here."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(_reduce_on, args=(str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
    whole = UnderstandingMetrics()
    for rank in (0, 1):
        whole.update(*_answers(rank))
    for rank in (0, 1):
        values, confusions, loss, rate = torch.load(tmp_path / f"{rank}.pt")
        assert values == whole.compute()
        assert confusions == {k: v.tolist() for k, v in whole.confusions().items()}
        assert loss == (3 * 1.0 + 9.0) / (3 * 4 + 2)
        assert math.isnan(rate)
    assert whole.compute()["accuracy/emotion"] == 0.6
    assert whole.compute()["wer"] == pytest.approx(1 / 3)
