"""Words and characters counted by hand, calibration against torchmetrics, and figures by source."""

import math
from dataclasses import replace

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_echat.evaluation.calibration import calibration
from lightning_echat.evaluation.text_units import characters_of, count_errors, words_of
from lightning_echat.evaluation.understanding import summarize_understanding


def test_english_words_lose_case_and_punctuation_and_keep_numbers():
    assert words_of("Don't  STOP—now, it's 5!") == ["dont", "stop", "now", "its", "5"]


def test_chinese_units_are_characters_and_runs_of_latin_letters():
    assert characters_of("我 喜欢,ＡＰＰ 3号。", language="zh") == ["我", "喜", "欢", "app", "3", "号"]


def test_english_characters_keep_one_space_between_words():
    assert characters_of("Hi,  you", language="en") == list("hi you")


def test_errors_are_counted_by_kind_and_over_the_whole_set():
    heard = [["the", "cat", "sat", "down"], ["on"], []]
    said = [["the", "cat", "sat"], ["off", "it"], ["mat"]]
    counts = count_errors(heard, said)
    assert (counts.substitutions, counts.deletions, counts.insertions, counts.reference) == (1, 2, 1, 6)
    assert counts.rate == pytest.approx(4 / 6)


def test_a_space_is_a_character_like_any_other():
    assert count_errors([list("ab")], [list("a b")]).errors == 1


def test_words_over_nothing_have_no_rate():
    assert math.isnan(count_errors([["a"]], [[]]).rate)


def test_calibration_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(300, 4, generator=generator).softmax(1)
    sharp = (probabilities * 20).softmax(1)
    truths = torch.randint(4, (300,), generator=generator)
    names = ["a", "b", "c", "d"]
    found = calibration(
        [dict(zip(names, row, strict=True)) for row in sharp.tolist()], [names[truth] for truth in truths.tolist()]
    )
    expected = multiclass_calibration_error(sharp, truths, num_classes=4, n_bins=10, norm="l1")
    assert found["ece"] == pytest.approx(float(expected), abs=1e-6)
    assert sum(row["items"] for row in found["reliability"]) == 300
    assert found["accuracy"] == pytest.approx(float((sharp.argmax(1) == truths).float().mean()))


def test_one_who_is_always_sure_and_half_right_is_off_by_a_half():
    sure = {"female": 1.0, "male": 0.0}
    found = calibration([sure, sure], ["female", "male"])
    assert found["ece"] == 0.5
    assert found["reliability"] == [{"low": 0.9, "high": 1.0, "items": 2, "confidence": 1.0, "accuracy": 0.5}]


def test_figures_are_given_by_source_and_by_language(make_record):
    labels = {"age": "old", "gender": "female", "emotion": "sad", "event": "cough"}
    task = "transcribe_and_label"
    tags = "<old><female><sad><cough>"
    english = make_record("a", task=task, transcript="the key", text=f"the key{tags}", labels=labels)
    chinese = make_record("b", task=task, transcript="你好吗", text=f"你好{tags}", labels=labels)
    records = [
        replace(english, item=replace(english.item, source="held-out voices")),
        replace(chinese, item=replace(chinese.item, source="unseen voice types", language="zh")),
    ]
    records[0].label_probabilities = {"gender": {"female": 0.8, "male": 0.2}}
    summary = summarize_understanding(records)
    assert summary["wer"] == 0.0
    assert summary["cer"] == {"en": 0.0, "zh": pytest.approx(1 / 3)}
    assert set(summary["by_source"]) == {"held-out voices", "unseen voice types"}
    assert summary["by_source"]["unseen voice types"]["items"] == 1
    assert math.isnan(summary["by_source"]["unseen voice types"]["wer"])
    assert summary["calibration"]["gender"]["items"] == 1
    assert summary["calibration"]["gender"]["unscored"] == 1
    assert summary["calibration"]["gender"]["ece"] == pytest.approx(0.2)
    assert summary["calibration"]["age"]["unscored"] == 2
