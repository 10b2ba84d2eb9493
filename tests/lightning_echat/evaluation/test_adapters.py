"""Small files in the formats of other benchmarks, written here, and their metrics counted by hand."""

import json
import math

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.writers import encode_audio
from lightning_echat.evaluation.adapters import echomind, seed_tts, voicebench
from lightning_echat.evaluation.adapters.convert import items
from lightning_echat.evaluation.item_sets import EvaluationSet, read_item_set
from lightning_echat.testing import dummy_audio


def posed(path):
    return list(read_item_set(EvaluationSet(name="s", shards=[str(path)]), counter=SkipCounter()))


def test_voicebench_lines_become_items_that_keep_their_reference(tmp_path, capsys):
    (tmp_path / "1.wav").write_bytes(encode_audio(dummy_audio(0.5), audio_format="wav"))
    rows = [{"prompt": "Which one? A one B two", "audio": "1.wav", "reference": "B"}, {"prompt": "no audio"}]
    source = tmp_path / "mmsu.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items(source, format="voicebench", subset="mmsu", out=tmp_path / "items.jsonl")
    assert "1 not VoiceBench" in " ".join(capsys.readouterr().out.split())
    (only,) = posed(tmp_path / "items.jsonl")
    assert only.item.extra == {"benchmark": "voicebench/mmsu", "reference": "B"}
    assert only.item.categories == []


def test_echomind_scripts_become_items_with_label_and_neutral_voice(tmp_path):
    for name in ("target/a.wav", "neutral/a.wav"):
        path = tmp_path / "audio" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(encode_audio(dummy_audio(0.5), audio_format="wav"))
    script = {
        "case_id": 7,
        "topic": "work",
        "speak_a": "I finished it.",
        "spoken_info": "sad-toned expressive voice",
        "target_audio_info": {"target_input_audio_file": "target/a.wav"},
        "neutral_audio_info": {"neutral_input_audio_file": "neutral/a.wav"},
    }
    source = tmp_path / "script_info_synthesis.json"
    source.write_text(json.dumps([script, {**script, "case_id": 8, "spoken_info": "whisper"}]))
    items(source, format="echomind", out=tmp_path / "items.jsonl")
    first, second = posed(tmp_path / "items.jsonl")
    assert (first.item.transcript, first.item.categories) == ("I finished it.", ["emotion"])
    assert first.item.labels == {"emotion": "sad"} and first.neutral_audio is not None
    assert second.item.labels == {} and second.item.extra["spoken_info"] == "whisper"


def test_seed_tts_lists_are_read_in_all_their_forms(tmp_path):
    path = tmp_path / "meta.lst"
    path.write_text("u1|who|p/1.wav|say this|w/1.wav\nu2|who|p/2.wav|and that\nu3.wav|text|p.wav\nu4|alone\n\n")
    found = list(seed_tts.read_list(path))
    assert [entry.name for entry in found] == ["u1", "u2", "u3", "u4"]
    assert [entry.text for entry in found] == ["say this", "and that", "text", "alone"]
    assert found[0].recording == "w/1.wav" and found[1].prompt_audio == "p/2.wav"
    path.write_text("one field\n")
    with pytest.raises(UserError, match=r"meta\.lst:1: 1 fields"):
        list(seed_tts.read_list(path))


def test_seed_tts_averages_the_rates_of_utterances():
    assert seed_tts.mean_error_rate(["a b", "x"], ["a b", "a"], language="en") == 0.5
    assert seed_tts.mean_error_rate(["你好吗"], ["你好"], language="zh") == 0.5
    assert math.isnan(seed_tts.mean_error_rate([], [], language="en"))


@pytest.mark.parametrize(
    ("reply", "option"),
    [
        ("B", "B"),
        ("c) because", "C"),
        ("The answer is B.", "B"),
        ("I would choose option (D)", "D"),
        ("the correct answer would be **A**", "A"),
        ("答案是C", "C"),
        ("A cat is an animal", None),
        ("The answer is not known", None),
        ("the answer is a, no, the answer is b", None),
        ("", None),
    ],
)
def test_the_option_that_a_reply_names_is_found_or_nothing_is(reply, option):
    assert voicebench.chosen_option(reply) == option


def test_a_reply_without_an_option_is_wrong_and_counted_and_no_guess():
    found = voicebench.choice_accuracy(["B", "no idea", "A"], ["B", "A", "C"])
    assert found == {"items": 3, "accuracy": pytest.approx(1 / 3), "unparsed": pytest.approx(1 / 3)}


def test_an_empty_reply_is_no_refusal():
    found = voicebench.refusal_rate(["I'm sorry, no.", "Sure, take", ""])
    assert found == {"items": 3, "refusal_rate": pytest.approx(1 / 3), "empty": pytest.approx(1 / 3)}


def test_votes_and_ratings_are_averaged_as_voicebench_does():
    assert voicebench.qa_accuracy([["Yes", "yes.", "No"], ["Yes", "No", "no"], ["yes", "no"]]) == pytest.approx(1 / 3)
    assert voicebench.open_score([[5, 4, 3], [1, 1, 1]]) == 2.5


def test_echomind_metrics_by_hand():
    found = echomind.choice_accuracy(["The answer is: [B]", "The answer is: C", "maybe A"], ["B", "A", "A"])
    assert found == {"items": 3, "accuracy": pytest.approx(1 / 3), "unparsed": pytest.approx(1 / 3)}
    assert echomind.mean_wer(["a b", "x y"], ["a b", "x z"]) == 0.25
    means = echomind.mean_criteria([{"naturalness": 4}, {"naturalness": 2, "context_fit": 5}])
    assert (means["naturalness"], means["context_fit"]) == (3, 5)
    assert math.isnan(means["colloquialism"])


def test_a_wrong_subset_is_told_with_the_nearest(tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text("{}\n")
    with pytest.raises(UserError, match="did you mean 'openbookqa'"):
        items(source, format="voicebench", subset="openbookq", out=tmp_path / "items.jsonl")
    with pytest.raises(UserError, match=r"NAME\.jsonl in"):
        items(source, format="voicebench", subset="mmsu", out=tmp_path / "elsewhere" / "items.jsonl")
