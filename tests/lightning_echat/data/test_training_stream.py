import json
from collections import Counter

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.writers import write_shard
from lightning_echat.testing import dummy_dialogue, write_dummy_shards
from tests.lightning_echat.data.data_helpers import SIDECAR, members, write_tar
from tests.lightning_echat.data.stream_helpers import digest, keys, some, source, training


def test_dialogues_become_batches_that_say_what_was_read(tokens, shards):
    loader = training(tokens, [source(shards)])
    batches = some(loader)
    assert set(keys(batches)) == {f"dialogue-{i:06d}" for i in range(24)}
    assert {reference.source for batch in batches for reference in batch.references} == {"a"}
    summed = Counter()
    for batch in batches:
        summed.update(batch.health)
    assert summed == loader.health.counts
    assert summed["read"] == summed["kept"] == summed["drawn/a/transcribe"] >= len(keys(batches))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_batches(tokens, shards, workers):
    def run(seed):
        sources = [source(shards), source(shards, name="b", kind="speech_to_text")]
        return digest(some(training(tokens, sources, workers=workers, seed=seed, augmentation=AugmentationConfig())))

    assert run(0) == run(0)
    assert run(0) != run(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_pass_over_the_loader_does_not_repeat_the_first(tokens, shards, workers):
    loader = training(tokens, [source(shards)], workers=workers)
    assert keys(some(loader)) != keys(some(loader))


def test_ranks_and_workers_read_different_dialogues_of_an_epoch(tokens, shards):
    once = source(shards, repeat=False)
    read = []
    for rank in range(2):
        read += keys(training(tokens, [once], rank=rank, world_size=2, workers=2))
    assert Counter(read) == Counter(f"dialogue-{i:06d}" for i in range(24))


def test_one_shard_serves_many_readers_and_keeps_its_share(tokens, tmp_path, shards):
    small = write_dummy_shards(tmp_path, shards=1, samples_per_shard=6, first=900)
    sources = [source(shards), source(small, name="small")]
    for rank in range(4):
        loader = training(tokens, sources, rank=rank, world_size=4)
        some(loader, 30)
        drawn = loader.health.counts
        assert drawn["drawn/small/transcribe"] / drawn["kept"] == pytest.approx(0.5, abs=0.12)


def test_shares_hold_for_what_comes_out_although_a_source_skips(tokens, tmp_path, shards):
    half = tmp_path / "half.tar"
    content = {}
    for number in range(20):
        content |= members(f"k{number}", sidecar=SIDECAR if number % 2 else b"{")
    write_tar(half, content)
    loader = training(tokens, [source(shards), source(half, name="half")], max_skip_share=0.9)
    some(loader, 60)
    counts = loader.health.counts
    assert counts["drawn/half/transcribe"] / counts["kept"] == pytest.approx(0.5, abs=0.08)
    assert counts["skipped/broken JSON"] > 0
    assert counts["kept"] + counts["skipped/broken JSON"] == counts["read"]


def test_a_source_that_is_not_repeated_ends_and_the_others_go_on(tokens, tmp_path, shards):
    once = write_dummy_shards(tmp_path, shards=1, samples_per_shard=4, first=900)
    loader = training(tokens, [source(shards), source(once, name="once", repeat=False)])
    read = Counter(keys(some(loader, 30)))
    assert [read[f"dialogue-{i:06d}"] for i in range(900, 904)] == [1] * 4
    assert read["dialogue-000000"] > 1


def test_packed_rows_hold_several_dialogues(tokens, shards):
    packed = BatchingConfig(tokens_per_batch=2000, max_ids=500, pool=32, packed=True)
    batch = some(training(tokens, [source(shards)], batching=packed), 1)[0]
    assert int(batch.document_ids.max()) > 1
    assert batch.input_ids.shape[0] == 4
    starts = batch.position_ids.eq(0) & batch.document_ids.gt(0)
    assert int(starts.sum()) == len(batch.references)
    # Once padding has begun in a row nothing else follows.
    assert (batch.document_ids.eq(0).int().diff(dim=1) >= 0).all()
    assert batch.input_ids[batch.clip_rows, batch.clip_starts].unique().numel() == 1


def test_augmentation_alters_training_only_and_never_history(tokens, tmp_path):
    folder = write_dummy_shards(tmp_path, shards=1, samples_per_shard=1, exchanges=2)
    chat = source(folder, kind="speech_to_text")

    def mels(augmentation):
        loader = training(tokens, [chat], augmentation=augmentation, expand_history=False)
        batch = some(loader, 1)[0]
        return batch.log_mels[:2]

    plain, augmented = mels(None), mels(AugmentationConfig())
    assert torch.equal(plain[0], augmented[0])
    assert not torch.equal(plain[1], augmented[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_skips_stop_the_run_in_one_line(tokens, tmp_path, workers):
    path = tmp_path / "t.tar"
    content = {}
    for number in range(60):
        content |= members(f"k{number}", sidecar=SIDECAR if number % 4 else b"{")
    write_tar(path, content)
    with pytest.raises(UserError, match="broken JSON") as error:
        some(training(tokens, [source(path)], workers=workers), 50)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [{}, {f"k{i}.txt": b"" for i in range(3)}, members("k", sidecar=b"{")])
def test_a_source_without_a_usable_sample_stops_the_run_instead_of_waiting_for_ever(tokens, tmp_path, workers, content):
    path = write_tar(tmp_path / "t.tar", content)
    with pytest.raises(UserError, match="usable"):
        some(training(tokens, [source(path)], workers=workers, max_skip_share=1.0), 1)


def test_written_dialogues_need_no_audio(tokens, tmp_path):
    dialogue = dummy_dialogue(1)
    for turn in dialogue.turns:
        turn.audio = None
    write_shard(tmp_path / "text.tar", [dialogue])
    loader = training(tokens, [source(tmp_path / "text.tar", kind="text_to_text")])
    batch = some(loader, 1)[0]
    assert batch.log_mels.shape[0] == 0
    assert batch.num_supervised > 0


def test_the_sidecar_of_the_helpers_is_what_the_writer_writes(tmp_path):
    write_dummy_shards(tmp_path, shards=1, samples_per_shard=1)
    assert json.loads((tmp_path / "index.json").read_text())["schema"] == SIDECAR["schema"]
