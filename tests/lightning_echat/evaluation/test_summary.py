import json
import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.evaluation.machine import machine_facts, package_versions
from lightning_echat.evaluation.records import score_records
from lightning_echat.evaluation.rubric import RubricJudge
from lightning_echat.evaluation.summary import (
    label_scores,
    summarize,
    summarize_empathy,
    summarize_speech,
    summarize_thinking,
    summarize_understanding,
    word_error_rate,
    write_report_json,
)

TRUTHS = ["happy", "happy", "happy", "sad", "sad", "angry"]
ANSWERS = ["happy", "sad", "happy", "sad", "happy", "angry"]


def heard_emotions(make_record, truths, answers):
    return [
        make_record(str(place), labels={"emotion": truth}, heard={"emotion": answer} if answer else {})
        for place, (truth, answer) in enumerate(zip(truths, answers, strict=True))
    ]


def test_accuracy_and_macro_f1_agree_with_torchmetrics(make_record):
    records = heard_emotions(make_record, TRUTHS, ANSWERS)
    names = ["happy", "sad", "angry"]
    target = torch.tensor([names.index(name) for name in TRUTHS])
    heard = torch.tensor([names.index(name) for name in ANSWERS])
    scores = label_scores(records, "emotion")
    assert scores["accuracy"] == pytest.approx(
        multiclass_accuracy(heard, target, num_classes=3, average="micro").item()
    )
    assert scores["macro_f1"] == pytest.approx(
        multiclass_f1_score(heard, target, num_classes=3, average="macro").item()
    )


def test_an_answer_that_names_no_label_counts_as_wrong_and_is_shown(make_record):
    records = [*heard_emotions(make_record, ["sad", "sad"], ["sad", None]), make_record("x", text="garbage")]
    summary = summarize_understanding(records)
    assert summary["accuracy"]["emotion"] == pytest.approx(1 / 3)
    assert summary["accuracy"]["age"] == 0.0
    assert summary["confusion"]["emotion"] == {
        "labels": ["sad"],
        "predicted": ["sad", "unparsed"],
        "counts": [[1, 2]],
    }
    assert summary["items"] == 3


def test_label_sets_without_a_reference_are_left_out(make_record):
    summary = summarize_understanding([make_record(labels={"emotion": "sad"}, heard={"emotion": "sad", "age": "old"})])
    assert set(summary["accuracy"]) == {"emotion"}
    assert set(summary["majority_baseline"]) == {"emotion"}


def test_the_majority_baseline_is_that_of_the_set_itself(make_record):
    summary = summarize_understanding(heard_emotions(make_record, TRUTHS, ANSWERS))
    assert summary["majority_baseline"]["emotion"] == 0.5


def test_a_second_set_stands_apart_and_does_not_touch_the_first(make_record):
    first, other = make_record("a", set_name="voices"), make_record("a", set_name="voice types", text="garbage")
    summary = summarize_understanding([first, other])
    assert summary["set"] == "voices"
    assert summary["items"] == 1
    assert summary["accuracy"]["age"] == 1.0
    assert summary["other_sets"]["voice types"]["accuracy"]["age"] == 0.0


def test_understanding_answers_are_read_as_their_task_writes_them(make_record):
    record = make_record(task="transcribe_and_label", text="where is my blue key<old><female><happy><cough>")
    summary = summarize_understanding([record])
    assert summary["wer"] == 0.0
    assert summary["accuracy"] == {"age": 1.0, "gender": 1.0, "emotion": 0.0, "event": 1.0}
    assert summary["confusion"]["emotion"]["predicted"] == ["happy", "sad", "unparsed"]


def test_wer_counts_words_over_the_whole_set_and_a_missing_transcript_as_silence(make_record):
    right = make_record("a", transcript="Play some jazz!", words="play some jazz")
    wrong = make_record("b", transcript="stop", words="shop")
    assert word_error_rate([right, wrong]) == pytest.approx(1 / 4)
    silent = make_record("c", transcript="stop it now", text="garbage")
    assert word_error_rate([right, wrong, silent]) == pytest.approx(4 / 7)
    assert math.isnan(word_error_rate([make_record(transcript="")]))


def test_thinking_counts_malformed_answers_against_the_parse_rate_and_the_labels(make_record):
    summary = summarize_thinking([make_record("a"), make_record("b", text="only a reply")])
    assert summary["parse_rate"] == 0.5
    assert summary["accuracy"] == dict.fromkeys(["age", "gender", "emotion", "event", "reply_emotion"], 0.5)


def test_answers_that_need_not_think_have_no_parse_rate(make_record):
    summary = summarize_thinking([make_record(task="text_to_text", text="a reply")])
    assert summary["items"] == 0
    assert math.isnan(summary["parse_rate"])


def test_empathy_stands_beside_its_control_with_intervals_and_a_paired_difference(make_record):
    judge = RubricJudge()
    perfect = "i am sorry, dear grandma. drink warm water. the blue key is here. take your time."
    ours = score_records([make_record(str(place), reply=perfect) for place in range(6)], judge=judge)
    plain = "let us look for the blue key."
    control = [make_record(str(place), reply=plain) for place in range(6)]
    control = score_records([*control, make_record("unpaired", reply=perfect)], judge=judge)
    summary = summarize_empathy(ours, controls={"text_only": control}, seed=0)
    assert summary["judge"] == "rubric/echat_en_v1"
    for category in CATEGORIES:
        assert summary[category] == [100.0, 100.0, 100.0]
        assert summary["items_in_category"][category] == 6
        assert summary["controls"]["text_only"][category][0] == pytest.approx((6 * 20 + 100) / 7)
        assert summary["controls"]["text_only"]["difference"][category] == [80.0, 80.0, 80.0]


def test_a_category_without_items_has_no_score(make_record):
    records = score_records([make_record(labels={"gender": "male"})], judge=RubricJudge())
    summary = summarize_empathy(records, controls={}, seed=0)
    assert summary["items_in_category"]["event"] == 0
    assert all(math.isnan(value) for value in summary["event"])


def test_unscored_answers_and_two_judges_never_make_one_table(make_record):
    (scored,) = score_records([make_record("a")], judge=RubricJudge())
    with pytest.raises(ValueError, match="every answer must be scored"):
        summarize_empathy([scored, make_record("b")], controls={}, seed=0)


def test_speech_counts_the_silent_and_the_cut_short(make_record):
    records = [make_record("a", codes=25), make_record("b", codes=0, finished=False)]
    records[0].reply_seconds = 1.0
    summary = summarize_speech(records)
    assert summary["replies"] == 1
    assert summary["without_speech"] == 1
    assert summary["unfinished"] == 1
    assert summary["speech_codes"] == 25
    assert summary["seconds_of_audio"] == 1.0


def test_speech_has_rates_of_truncation_repetition_and_duration(make_record):
    records = [make_record("a", codes=25), make_record("b", codes=75), make_record("c", finished=False)]
    records[0].repetition = 0.2
    summary = summarize_speech(records)
    assert summary["truncation_rate"] == pytest.approx(1 / 3)
    # A stuck decoder's 75 codes are 72 runs of four, all alike.
    assert summary["repetition_rate"] == pytest.approx((0.2 + 71 / 72) / 2)
    assert summary["seconds_per_reply"] == pytest.approx(2.0)
    nothing = summarize_speech([make_record("a")])
    assert math.isnan(nothing["repetition_rate"]) and math.isnan(nothing["seconds_per_reply"])
    assert math.isnan(summarize_speech([])["truncation_rate"])


def test_the_report_of_an_empty_evaluation_says_null_and_no_good_number(tmp_path):
    report = summarize(understanding=[], dialogues=[], controls={"text_only": []}, seed=0)
    write_report_json(tmp_path / "run" / "report.json", report)
    read = json.loads((tmp_path / "run" / "report.json").read_text())
    assert read["understanding"]["wer"] is None
    assert read["thinking"]["parse_rate"] is None
    assert read["empathy"]["judge"] is None
    assert read["empathy"]["multi"] == [None, None, None]


def test_a_result_says_where_and_with_what_it_was_made():
    versions = package_versions()
    assert versions["torch"] == torch.__version__.split("+")[0]
    assert versions["python"].startswith("3.")
    facts = machine_facts()
    assert facts["cpu_cores"] >= 1
    assert facts["gpus"] == [] or isinstance(facts["gpus"][0], str)
    json.dumps([versions, facts])
