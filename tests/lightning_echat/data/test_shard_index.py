import json
from pathlib import Path

import pytest

from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import INDEX_SUFFIX, find_index, index_path, write_index
from lightning_echat.data.shards import ShardPart, read_samples, read_shard
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.data_helpers import members, write_tar


@pytest.fixture
def shard(tmp_path):
    return str(write_dummy_shards(tmp_path, shards=1, samples_per_shard=6) / "shard-000000.tar")


def read(shard, start=0, **part):
    counter = SkipCounter()
    return list(read_shard(ShardPart(path=shard, **part), start=start, counter=counter)), counter


class _CountedFile:
    """Counts the bytes that a reader takes from a file."""

    def __init__(self, file):
        self._file, self.taken = file, 0

    def read(self, size=-1):
        data = self._file.read(size)
        self.taken += len(data)
        return data

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.fixture
def taken(monkeypatch):
    """The files that were opened, which know how much of them was read."""
    opened = []

    def open_counted(shard, counter, access):
        opened.append(_CountedFile(open(shard, "rb")))  # noqa: SIM115, PTH123
        return opened[-1]

    monkeypatch.setattr("lightning_echat.data.shards._open", open_counted)
    return opened


@pytest.mark.parametrize("start", range(7))
def test_reading_from_a_place_on_is_the_end_of_reading_everything(shard, start):
    everything, _ = read(shard)
    assert len(everything) == 6
    assert read(shard, start)[0] == everything[start:]
    Path(index_path(shard)).unlink()
    assert read(shard, start)[0] == everything[start:]


def test_a_part_counts_places_over_the_whole_shard(shard):
    assert [sample.ordinal for sample in read(shard, 2, part=1, parts=2)[0]] == [3, 5]


@pytest.mark.parametrize("wanted", [[], [0], [5], [1, 2, 3], [4, 0, 4], [2, 9], [17]])
def test_chosen_samples_are_those_of_the_whole_shard(shard, wanted, tmp_path):
    everything, _ = read(shard)
    expected = [everything[place] for place in sorted(set(wanted)) if place < 6]
    assert list(read_samples(shard, wanted, counter=SkipCounter())) == expected
    (tmp_path / f"shard-000000.tar{INDEX_SUFFIX}").unlink()
    assert list(read_samples(shard, wanted, counter=SkipCounter())) == expected


def test_with_an_index_only_what_is_asked_for_is_read(shard, taken):
    (wanted,) = read_samples(shard, [4], counter=SkipCounter())
    size = sum(len(data) for data in wanted.members.values())
    assert 0 < sum(file.taken for file in taken) < 3 * size + 20_000


def test_entries_name_the_bytes_of_their_sample(shard):
    index = find_index(shard, counter=SkipCounter())
    assert index is not None
    everything, _ = read(shard)
    assert [(entry.key, entry.offset, entry.size) for entry in index.samples] == [
        (sample.key, sample.offset, sample.size) for sample in everything
    ]
    assert all(b.offset == a.offset + a.size for a, b in zip(index.samples, index.samples[1:], strict=False))


def test_an_index_of_another_size_is_counted_and_not_used(shard, tmp_path):
    write_tar(tmp_path / "shard-000000.tar", members("new") | members("newer"))
    samples, counter = read(shard, 1)
    assert [sample.key for sample in samples] == ["newer"]
    assert counter.noticed == {"index out of date": 1}


def test_a_shard_rewritten_at_the_same_size_is_found_out_by_its_keys(tmp_path):
    """The size agrees, so only what stands at the place can tell."""
    path = write_tar(tmp_path / "a.tar", members("k0") | members("k1") | members("k2"))
    write_index(tmp_path)
    write_tar(path, members("k3") | members("k4") | members("k5"))
    samples, counter = read(str(path), 1)
    assert [sample.key for sample in samples] == ["k4", "k5"]
    assert counter.noticed == {"index out of date": 1}


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9}', '{"schema": 1, "samples": [{"kez": 1}]}'])
def test_an_index_that_is_none_is_counted_and_not_used(shard, text, tmp_path):
    (tmp_path / f"shard-000000.tar{INDEX_SUFFIX}").write_text(text)
    samples, counter = read(shard, 3)
    assert [sample.ordinal for sample in samples] == [3, 4, 5]
    assert counter.noticed == {"unreadable index": 1}


def test_the_folders_index_is_the_sum_of_the_shards(tmp_path):
    write_dummy_shards(tmp_path, shards=2, samples_per_shard=3)
    total = json.loads((tmp_path / "index.json").read_text())
    single = [json.loads(path.read_text()) for path in sorted(tmp_path.glob(f"*.tar{INDEX_SUFFIX}"))]
    assert total["samples"] == sum(len(index["samples"]) for index in single) == 6
    seconds = sum(sum(sample["seconds"].values()) for index in single for sample in index["samples"])
    assert total["seconds"] == pytest.approx(seconds, abs=0.01)
    assert [shard["sha256"] for shard in total["shards"]] == [index["sha256"] for index in single]
