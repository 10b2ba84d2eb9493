"""Anybody's items: JSON lines and shards give the same, and what is wrong is counted or told in one line."""

import json
import tarfile
from pathlib import Path

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.writers import add_member, encode_audio
from lightning_echat.evaluation.item_sets import EvaluationSet, read_item_set
from lightning_echat.testing import dummy_audio

GOOD = {
    "key": "a",
    "category": "emotion",
    "audio": "wav/a.wav",
    "transcript": "where is it",
    "labels": {"emotion": "sad", "age": "old"},
    "source": "held-out voices",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "set"
    (root / "wav").mkdir(parents=True)
    for name, seconds in (("a", 0.5), ("b", 0.6)):
        (root / "wav" / f"{name}.wav").write_bytes(encode_audio(dummy_audio(seconds), audio_format="wav"))
    (tmp_path / "outside.wav").write_bytes((root / "wav" / "a.wav").read_bytes())
    return root


def read(folder: Path, *rows, **options):
    path = folder / "items.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    counter = SkipCounter()
    return list(read_item_set(EvaluationSet(name="mine", shards=[str(path)], **options), counter=counter)), counter


def test_a_line_is_an_item_with_its_audio_labels_and_category(folder):
    ((posed,), counter) = read(folder, {**GOOD, "neutral_audio": "wav/b.wav", "reply": "here", "reply_emotion": "calm"})
    item = posed.item
    assert (item.key, item.set_name, item.categories) == ("a", "mine", ["emotion"])
    assert (item.transcript, item.labels) == ("where is it", {"emotion": "sad", "age": "old"})
    assert (item.source, item.language, item.reply, item.reply_emotion) == ("held-out voices", "en", "here", "calm")
    assert posed.parsed.audio[0] == (folder / "wav" / "a.wav").read_bytes()
    assert posed.neutral_audio == (folder / "wav" / "b.wav").read_bytes()
    assert not counter.skipped


def test_without_a_category_an_item_counts_in_each_whose_cue_it_carries(folder):
    ((posed,), _) = read(folder, {name: value for name, value in GOOD.items() if name != "category"})
    assert posed.item.categories == ["emotion", "age"]


def test_chinese_words_are_known_as_such(folder):
    ((posed,), _) = read(folder, {**GOOD, "transcript": "你好"})
    assert posed.item.language == "zh"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"key": ', "broken JSON"),
        ("[1]", "broken JSON"),
        ({**GOOD, "audio": "../outside.wav"}, "audio outside the set"),
        ({**GOOD, "audio": "/etc/hostname"}, "audio outside the set"),
        ({**GOOD, "audio": "wav/none.wav"}, "missing audio"),
        ({**GOOD, "audio": 7}, "broken audio path"),
        ({**GOOD, "labels": {"emotion": "sadd"}}, "unknown label"),
        ({**GOOD, "category": "emotoin"}, "unknown category"),
        ({**GOOD, "category": "event"}, "category without its cue"),
        ({**GOOD, "category": "multi", "labels": {"age": "old"}}, "category without its cue"),
        ({**GOOD, "language": "fr"}, "unknown language"),
        ({**GOOD, "transcrip": "x"}, "unknown field"),
        ({**GOOD, "key": "b"}, "duplicate key"),
    ],
)
def test_an_item_that_cannot_be_used_is_counted_by_reason(folder, row, reason):
    posed, counter = read(folder, {**GOOD, "key": "b"}, row)
    assert [entry.item.key for entry in posed] == ["b"]
    assert counter.skipped == {reason: 1}


def test_a_set_without_any_usable_item_is_one_line_that_says_why(folder):
    with pytest.raises(UserError, match=r"'mine' holds no usable item.*unknown label") as raised:
        read(folder, {**GOOD, "labels": {"age": "ancient"}})
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_told_with_the_nearest_there_is(folder):
    read(folder, GOOD)
    wrong = EvaluationSet(name="mine", shards=[str(folder / "item.jsonl")])
    with pytest.raises(UserError, match=r"no file .*item\.jsonl; did you mean 'items\.jsonl'"):
        list(read_item_set(wrong, counter=SkipCounter()))


def test_a_shard_holds_the_same_items_as_json_lines(folder):
    ((from_lines,), _) = read(folder, {**GOOD, "neutral_audio": "wav/b.wav"})
    sidecar = {
        "schema": 1,
        "category": "emotion",
        "source": "held-out voices",
        "neutral_audio": "neutral.wav",
        "turns": [{"role": "user", "text": GOOD["transcript"], "audio": "0.wav", "labels": GOOD["labels"]}],
    }
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        add_member(tar, "a.json", json.dumps(sidecar).encode())
        add_member(tar, "a.0.wav", (folder / "wav" / "a.wav").read_bytes())
        add_member(tar, "a.neutral.wav", (folder / "wav" / "b.wav").read_bytes())
    entry = EvaluationSet(name="mine", shards=[str(folder / "shard-000000.tar")])
    (from_shard,) = read_item_set(entry, counter=SkipCounter())
    assert from_shard.item == from_lines.item
    assert from_shard.parsed.audio == from_lines.parsed.audio
    assert from_shard.neutral_audio == from_lines.neutral_audio


def test_only_so_many_items_are_read_as_asked(folder):
    posed, _ = read(folder, *({**GOOD, "key": f"k{number}"} for number in range(5)), max_items=2)
    assert [entry.item.key for entry in posed] == ["k0", "k1"]


def test_too_many_bad_items_end_the_reading(folder):
    rows = [{**GOOD, "key": f"k{number}"} for number in range(60)]
    with pytest.raises(UserError, match="max_skip_share"):
        read(folder, *rows, *({**GOOD, "category": "x", "key": f"b{number}"} for number in range(6)))


def test_audio_is_decoded_only_when_it_is_asked(folder):
    (folder / "wav" / "a.wav").write_bytes(b"no sound")
    ((posed,), counter) = read(folder, GOOD)
    assert posed.parsed.audio == [b"no sound"] and not counter.skipped
