import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.corpus.synthesize import synthesize
from lightning_echat.data.decoding import decode_dialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, read_shard

SPLITS = ("train", "validation", "held_out_voices", "held_out_types", "text")


def shards_of(corpus: Path) -> dict[str, bytes]:
    return {str(path.relative_to(corpus)): path.read_bytes() for path in sorted(corpus.rglob("*.tar"))}


def dialogues_of(corpus: Path, split: str):
    counter = SkipCounter()
    for path in sorted((corpus / split).glob("*.tar")):
        for stored in read_shard(ShardPart(path=str(path)), counter=counter):
            yield decode_dialogue(stored)
    assert not counter.skipped
    assert not counter.noticed


@pytest.fixture
def copy_of_corpus(small_corpus, tmp_path) -> Path:
    return Path(shutil.copytree(small_corpus, tmp_path / "copy"))


def test_the_layout_is_shards_and_index_per_split_beside_texts_tokenizer_and_parameters(small_corpus, small_sizes):
    assert sorted(path.name for path in small_corpus.iterdir()) == sorted(
        [*SPLITS, "corpus.json", "text.jsonl", "tokenizer"]
    )
    for split in SPLITS:
        index = json.loads((small_corpus / split / "index.json").read_text())
        assert index["samples"] == small_sizes[f"{split}_dialogues"] == len(list(dialogues_of(small_corpus, split)))
    assert len(list((small_corpus / "train").glob("*.tar"))) == 3
    assert json.loads((small_corpus / "corpus.json").read_text())["parameters"]["seed"] == 0
    assert not list(small_corpus.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(small_corpus, small_sizes, tmp_path):
    synthesize(tmp_path / "again", **{**small_sizes, "workers": 2})
    assert shards_of(tmp_path / "again") == shards_of(small_corpus)
    for name in ("text.jsonl", "tokenizer/tokenizer.json", "train/index.json", "corpus.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small_corpus / name).read_bytes()


def test_dialogues_do_not_depend_on_the_size_of_shards(small_corpus, small_sizes, tmp_path):
    synthesize(tmp_path / "other", **{**small_sizes, "dialogues_per_shard": 7})
    for ours, theirs in zip(
        dialogues_of(small_corpus, "train"), dialogues_of(tmp_path / "other", "train"), strict=True
    ):
        assert ours.key == theirs.key
        assert all((a.audio == b.audio).all() for a, b in zip(ours.turns, theirs.turns, strict=True))


def test_another_seed_gives_another_corpus(small_corpus, small_sizes, tmp_path):
    synthesize(tmp_path / "other", **{**small_sizes, "seed": 1})
    assert shards_of(tmp_path / "other")["train/shard-000000.tar"] != shards_of(small_corpus)["train/shard-000000.tar"]


def test_a_second_run_touches_nothing_and_takes_less_than_a_second(copy_of_corpus, small_sizes):
    before = {path: path.stat().st_mtime_ns for path in copy_of_corpus.rglob("*") if path.is_file()}
    start = time.perf_counter()
    synthesize(copy_of_corpus, **small_sizes)
    assert time.perf_counter() - start < 1.0
    assert before == {path: path.stat().st_mtime_ns for path in copy_of_corpus.rglob("*") if path.is_file()}


def test_a_run_that_was_cut_off_is_completed_with_the_same_bytes(copy_of_corpus, small_corpus, small_sizes):
    (copy_of_corpus / "train" / "shard-000001.tar").unlink()
    (copy_of_corpus / "train" / "index.json").unlink()
    (copy_of_corpus / "train" / "shard-000001.tar.tmp").write_bytes(b"half a shard")
    kept = (copy_of_corpus / "train" / "shard-000000.tar").stat().st_mtime_ns
    synthesize(copy_of_corpus, **small_sizes)
    assert shards_of(copy_of_corpus) == shards_of(small_corpus)
    assert (copy_of_corpus / "train" / "shard-000000.tar").stat().st_mtime_ns == kept
    assert (copy_of_corpus / "train" / "index.json").read_bytes() == (
        small_corpus / "train" / "index.json"
    ).read_bytes()
    assert not list(copy_of_corpus.rglob("*.tmp"))


def test_other_parameters_are_refused_by_name_unless_overwriting(copy_of_corpus, small_sizes):
    with pytest.raises(UserError, match=r"other parameters \(seed, train_dialogues\).*--overwrite"):
        synthesize(copy_of_corpus, **{**small_sizes, "seed": 3, "train_dialogues": 5})
    synthesize(copy_of_corpus, **{**small_sizes, "seed": 3, "train_dialogues": 5}, overwrite=True)
    assert json.loads((copy_of_corpus / "train" / "index.json").read_text())["samples"] == 5
    assert len(list((copy_of_corpus / "train").glob("*.tar"))) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_dialogues": 0}, "train_dialogues must be at least 1"),
        ({"dialogues_per_shard": 0}, "dialogues_per_shard must be at least 1"),
        ({"validation_speakers": 0}, "validation_speakers must be at least 1"),
        ({"text_dialogues": -1}, "text_dialogues must not be negative"),
        ({"seed": -1}, "seed must not be negative"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"audio_format": "mp3"}, "unknown audio format 'mp3'"),
    ],
)
def test_senseless_sizes_are_refused_before_anything_is_written(espeak, tmp_path, small_sizes, wrong, message):
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "corpus", **{**small_sizes, **wrong})
    assert not (tmp_path / "corpus").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(espeak, tmp_path, small_sizes):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no corpus"):
        synthesize(tmp_path, **small_sizes, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_speakers_are_disjoint_across_splits_and_texts_of_tests_are_unseen(small_corpus):
    speakers = {split: {d.speaker for d in dialogues_of(small_corpus, split)} for split in SPLITS[:4]}
    assert sum(map(len, speakers.values())) == len(set().union(*speakers.values()))
    asked = {
        split: {turn.text for d in dialogues_of(small_corpus, split) for turn in d.turns if turn.role == "user"}
        for split in SPLITS
    }
    assert not (asked["train"] | asked["text"]) & (asked["validation"] | asked["held_out_voices"])


def test_dialogues_read_back_with_everything_that_the_schema_holds(small_corpus):
    for dialogue in dialogues_of(small_corpus, "train"):
        assert len({(t.labels["age"], t.labels["gender"]) for t in dialogue.turns[::2]}) == 1
        for turn in dialogue.turns:
            assert turn.text
            assert turn.audio is not None
            assert 0.5 * SAMPLE_RATE < turn.audio.numel() < 8 * SAMPLE_RATE
            assert float(turn.audio.abs().max()) < 0.96
            assert set(turn.labels) == ({"age", "gender", "emotion", "event"} if turn.role == "user" else {"emotion"})
            assert (turn.thinking is not None) == (turn.role == "assistant")
    for dialogue in dialogues_of(small_corpus, "text"):
        assert [turn.audio for turn in dialogue.turns] == [None, None]


def test_held_out_types_are_klatt_voices_and_nobody_else_has_them(small_corpus):
    assert all(d.voice_type.startswith("klatt-") for d in dialogues_of(small_corpus, "held_out_types"))
    assert not any(d.voice_type.startswith("klatt-") for d in dialogues_of(small_corpus, "train"))


def test_flac_takes_less_space_and_holds_the_same_samples(small_corpus, small_sizes, tmp_path):
    synthesize(tmp_path / "flac", **{**small_sizes, "audio_format": "flac"})
    size = lambda corpus: sum(map(len, shards_of(corpus).values()))  # noqa: E731
    assert size(tmp_path / "flac") < 0.8 * size(small_corpus)
    for ours, theirs in zip(dialogues_of(small_corpus, "train"), dialogues_of(tmp_path / "flac", "train"), strict=True):
        assert all((a.audio == b.audio).all() for a, b in zip(ours.turns, theirs.turns, strict=True))


def test_no_process_is_left_behind():
    assert not multiprocessing.active_children()
