"""The benchmark's items: balanced, deterministic, in voices and texts that no training has."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.corpus.benchmark import CATEGORIES, HELD_OUT, SEEN, UNSEEN, benchmark, write_item
from lightning_echat.corpus.dialogues import Split, speaker_of, write_script
from lightning_echat.corpus.queries import OPENINGS, queries_of


def written(category: str, count: int = 280):
    return [write_item(category, index=index, seed=0) for index in range(count)]


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_third_of_the_voices_is_of_a_type_that_training_never_hears(category):
    items = written(category)
    sources = Counter(item.source for item in items)
    assert sources == {HELD_OUT: 187, UNSEEN: 93}
    for item in items:
        assert (item.speaker.klatt > 0) == (item.source == UNSEEN)
    assert len({item.speaker.name for item in items}) == 280


@pytest.mark.parametrize(
    ("category", "emotions", "events"),
    [("emotion", 4, 1), ("age", 1, 1), ("gender", 1, 1), ("event", 1, 5), ("multi", 4, 5)],
)
def test_the_cues_of_a_category_and_no_others_are_there_each_as_often(category, emotions, events):
    labels = [item.exchange.labels for item in written(category)]
    for label_set, number in (("emotion", emotions), ("event", events), ("age", 3), ("gender", 2)):
        counts = Counter(found[label_set] for found in labels)
        assert len(counts) == number
        # Age and gender turn slowly, so that their last turn may be cut short.
        assert max(counts.values()) - min(counts.values()) <= 10
    by_source = Counter((item.source, item.exchange.labels["age"]) for item in written(category))
    assert len(by_source) == 6


def test_no_text_is_one_that_training_uses():
    kept = {query.text for group in queries_of(reserved=True) for query in group}
    trained = {query.text for group in queries_of(reserved=False) for query in group}
    for category in CATEGORIES:
        for item in written(category, 60):
            text = item.exchange.query
            bare = next((text.removeprefix(f"{word} ") for word in OPENINGS if text.startswith(f"{word} ")), text)
            assert bare in kept and bare not in trained


def test_seen_voices_are_those_of_the_training_split():
    item = write_item("multi", index=7, seed=3, train_speakers=5, seen=True)
    train = Split(name="train", number=0, dialogues=10, speakers=5)
    assert item.speaker == speaker_of(train, index=2, seed=3) == write_script(train, index=2, seed=3).speaker
    assert item.source == SEEN


def test_items_differ_by_seed_and_not_by_run():
    assert write_item("event", index=4, seed=1) == write_item("event", index=4, seed=1)
    assert write_item("event", index=4, seed=1) != write_item("event", index=4, seed=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*/*.tar"))}


SIZES: dict[str, Any] = {"items_per_category": 1, "seen_voices_items": 1, "items_per_shard": 3}


@pytest.mark.slow
def test_shards_are_the_same_whoever_makes_them(tmp_path):
    benchmark(tmp_path / "a", workers=1, **SIZES)
    benchmark(tmp_path / "b", workers=2, **SIZES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_is_missing_is_made_again_and_other_parameters_are_refused(tmp_path):
    sizes = SIZES
    benchmark(tmp_path / "a", workers=1, **sizes)
    before = contents(tmp_path / "a")
    (tmp_path / "a" / "items" / "shard-000001.tar").unlink()
    benchmark(tmp_path / "a", workers=1, **sizes)
    assert contents(tmp_path / "a") == before
    with pytest.raises(UserError, match="other parameters"):
        benchmark(tmp_path / "a", workers=1, **{**sizes, "items_per_category": 2})
    index = json.loads((tmp_path / "a" / "items" / "index.json").read_text())
    assert index["samples"] == 5 and index["seconds"] > 5


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"no benchmark"):
        benchmark(tmp_path)
