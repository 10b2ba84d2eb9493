from collections import Counter

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import TaskConfig
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.data_helpers import SIDECAR, members, wav, write_tar
from tests.lightning_echat.data.stream_helpers import digest, keys, reading, source, validating


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_validation_sees_every_dialogue_once_in_equal_steps(tokens, shards, world_size, workers):
    read, steps = [], set()
    for rank in range(world_size):
        batches = list(validating(tokens, shards, rank=rank, world_size=world_size, workers=workers))
        steps.add(len(batches))
        read += keys(batches)
    assert Counter(read) == Counter(f"dialogue-{i:06d}" for i in range(24))
    assert len(steps) == 1


def test_validation_order_does_not_depend_on_workers_and_repeats(tokens, shards):
    orders = [keys(validating(tokens, shards, workers=workers)) for workers in (0, 1, 2)]
    assert orders[0] == orders[1] == orders[2] == [f"dialogue-{i:06d}" for i in range(24)]
    loader = validating(tokens, shards, workers=2)
    assert keys(loader) == keys(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_take_equal_steps_although_one_has_nothing_usable(tokens, tmp_path, workers):
    # Of five dialogues the second, the only one that rank 1 of 2 has in the last batch, and the fourth are broken.
    folder = tmp_path / "v.tar"
    content = {}
    for number in range(8):
        content |= members(f"k{number}", audio=b"no audio" if number in (1, 3, 5, 7) else wav())
    write_tar(folder, content)
    found = []
    for rank in range(2):
        loader = validating(tokens, folder, rank=rank, world_size=2, workers=workers, max_skip_share=1.0)
        batches = list(loader)
        found.append((len(batches), keys(batches), loader.health.skipped))
    assert found[0] == (2, ["k0", "k2", "k4", "k6"], {})
    assert found[1] == (2, [], {"unreadable audio": 4})


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_sidecars_in_validation_are_counted_once_over_all_readers(tokens, tmp_path, workers):
    path = tmp_path / "v.tar"
    content = {}
    for number in range(9):
        content |= members(f"k{number}", sidecar=b"{" if number in (0, 8) else SIDECAR)
    write_tar(path, content)
    total = Counter()
    for rank in range(2):
        loader = validating(tokens, path, rank=rank, world_size=2, workers=workers)
        list(loader)
        total.update(loader.health.counts)
    assert total == {"read": 9, "kept": 7, "skipped/broken JSON": 2}


def test_an_empty_validation_set_is_the_users_to_mend(tokens, tmp_path):
    path = write_tar(tmp_path / "t.tar", {})
    with pytest.raises(UserError, match="'v' holds no usable sample"):
        list(validating(tokens, path))


def test_a_validation_set_has_one_task(tokens, shards):
    two = source(shards, tasks=[TaskConfig(kind="transcribe"), TaskConfig(kind="speech_to_text")])
    with pytest.raises(UserError, match="names 2 tasks"):
        ValidationStream(reading(tokens), source=two, name="v")


def test_history_is_expanded_on_request(tokens, tmp_path):
    folder = write_dummy_shards(tmp_path, shards=1, samples_per_shard=4, exchanges=2)
    expanded = keys(validating(tokens, folder))
    assert expanded == [f"dialogue-{i:06d}#{n}" for i in range(4) for n in (1, 2)]
    assert keys(validating(tokens, folder, expand_history=False)) == [f"dialogue-{i:06d}" for i in range(4)]


def test_a_dialogue_longer_than_allowed_is_skipped_and_counted(tokens, shards):
    short = BatchingConfig(tokens_per_batch=1000, max_ids=40, pool=8, validation_rows=3)
    loader = validating(tokens, shards, batching=short, max_skip_share=1.0)
    kept = keys(loader)
    assert loader.health.skipped["longer than max_ids"] == 24 - len(kept) > 0


def test_a_flac_corpus_gives_the_same_batches_as_wav(tokens, tmp_path):
    wave = write_dummy_shards(tmp_path / "wav", shards=1, samples_per_shard=4)
    flac = write_dummy_shards(tmp_path / "flac", shards=1, samples_per_shard=4, audio_format="flac")
    assert digest(validating(tokens, wave)) == digest(validating(tokens, flac))
