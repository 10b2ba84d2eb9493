"""Shards behind a URL: nothing lost, nothing repeated, failures named. The server is real, and fails on purpose."""

import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import ShardAccess, is_url
from lightning_echat.data.shards import ShardPart, below, expand_shards, read_samples, read_shard
from lightning_echat.data.verify import verify
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.data_helpers import members, write_tar
from tests.lightning_echat.data.faulty_server import FaultyServer

QUICK = ShardAccess(timeout=0.3, attempts=8, backoff=0.001)


@pytest.fixture
def server(tmp_path):
    folder = write_dummy_shards(tmp_path / "shards", shards=2, samples_per_shard=6)
    with FaultyServer(folder) as running:
        yield running


def local(server, number=0):
    path = str(server.folder / f"shard-{number:06d}.tar")
    return list(read_shard(ShardPart(path=path), counter=SkipCounter()))


def read(url, *, start=0, access=QUICK):
    counter = SkipCounter()
    samples = list(read_shard(ShardPart(path=url), start=start, counter=counter, access=access))
    return [replace(sample, shard="") for sample in samples], counter


def same(samples):
    return [replace(sample, shard="") for sample in samples]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["500"],
        ["refuse"],
        ["drop"],
        ["short"],
        ["stall"],
        ["drop", "drop", "drop"],
        ["500", "refuse", "drop", "500", "stall", "short"],
    ],
)
def test_whatever_the_server_does_every_sample_comes_once(server, faults, ranges):
    server.faults, server.ranges = list(faults), ranges
    samples, counter = read(f"{server.url}/shard-000000.tar")
    assert samples == same(local(server))
    assert counter.noticed == ({"read again": len(faults)} if faults else {})
    assert not server.faults, "every fault was met"


def test_a_server_that_drops_every_connection_is_read_to_the_end(server):
    """Progress counts: only failures without a byte between them use the attempts up."""
    server.every = 20_000
    samples, counter = read(f"{server.url}/shard-000000.tar")
    assert samples == same(local(server))
    assert counter.noticed["read again"] > QUICK.attempts


@pytest.mark.parametrize("fault", ["500", "refuse"])
def test_a_server_that_stays_away_ends_the_run_with_its_name(server, fault):
    server.faults = [fault] * 99
    with pytest.raises(UserError, match=r"shard-000000\.tar: no answer after 8 attempts"):
        read(f"{server.url}/shard-000000.tar")
    assert server.requests["/shard-000000.tar"] == 8


def test_a_shard_that_is_not_there_is_counted(server):
    samples, counter = read(f"{server.url}/gone.tar")
    assert (samples, counter.noticed) == ([], {"missing shard": 1})
    assert "404" in counter.examples["noticed/missing shard"]


def test_a_shard_cut_short_on_the_server_is_damaged_and_not_asked_for_again(server):
    path = server.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:100_000])
    samples, counter = read(f"{server.url}/shard-000000.tar")
    assert samples[:2] == same(local(server))[:2]
    assert counter.noticed == {"damaged shard": 1}
    assert server.requests["/shard-000000.tar"] == 1


def test_a_shard_rewritten_while_it_is_read_is_not_glued_together(server):
    """Half of the old and half of the new file would be read as one."""
    server.every = 60_000
    samples = read_shard(
        ShardPart(path=f"{server.url}/shard-000000.tar"), counter=(counter := SkipCounter()), access=QUICK
    )
    next(samples)
    server.tag = "two"
    list(samples)
    assert counter.noticed["damaged shard"] == 1
    assert "rewritten while it was read" in counter.examples["noticed/damaged shard"]


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_reading_from_a_place_on_seeks_where_there_is_an_index(server, start):
    samples, counter = read(f"{server.url}/shard-000000.tar", start=start)
    assert samples == same(local(server))[start:]
    (server.folder / "shard-000000.tar.index.json").unlink()
    assert read(f"{server.url}/shard-000001.tar", start=start)[0] == same(local(server, 1))[start:]
    assert not counter.noticed


def test_chosen_samples_come_through_faults_too(server):
    server.faults = ["500", "", "drop", "stall"]
    url = f"{server.url}/shard-000000.tar"
    samples = same(read_samples(url, [1, 4], counter=SkipCounter(), access=QUICK))
    assert samples == [same(local(server))[place] for place in (1, 4)]


def test_an_index_of_another_shard_is_found_out(server):
    write_tar(server.folder / "shard-000000.tar", members("new") | members("newer"))
    samples, counter = read(f"{server.url}/shard-000000.tar", start=1)
    assert [sample.key for sample in samples] == ["newer"]
    assert counter.noticed == {"index out of date": 1}


def test_patterns_name_urls(server):
    names = [f"{server.url}/shard-{number:06d}.tar" for number in range(2)]
    (server.folder / "all.txt").write_text("# mine\nshard-{000000..000001}.tar\n")
    assert expand_shards([f"{server.url}/shard-{{000000..000001}}.tar"]) == names
    assert expand_shards([f"{server.url}/all.txt"], access=QUICK) == names
    assert expand_shards([f"{server.url}/"], access=QUICK) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("*.tar", "cannot be listed"), ("gone.txt", "cannot read .*gone.txt"), ("gone/", "cannot read .*index.json")],
)
def test_patterns_that_name_nothing_are_the_users_to_mend(server, pattern, message):
    with pytest.raises(UserError, match=message):
        expand_shards([f"{server.url}/{pattern}"], access=QUICK)


def test_a_root_may_be_a_url():
    assert below("https://host/data", "train/*.tar") == "https://host/data/train/*.tar"
    assert below("https://host/data/", "train.tar") == "https://host/data/train.tar"
    assert below("data", "s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert below("data", "/far/a.tar") == "/far/a.tar"
    assert below("", "a.tar") == "a.tar"
    assert not is_url("C:/a.tar") and not is_url("a.tar") and is_url("s3://b/a.tar")


def test_verify_reads_urls_and_says_what_failed_on_the_way(server, capsys):
    server.faults = ["", "500", "drop"]
    verify([f"{server.url}/"], access=QUICK, workers=1)
    printed = capsys.readouterr().out
    assert "2 shards, 12 samples, 12 usable" in printed
    assert "2 reads failed and were repeated" in printed


@pytest.fixture
def bucket(tmp_path):
    folder = write_dummy_shards(tmp_path / "shards", shards=2, samples_per_shard=3)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield folder
    memory.rm("/bucket", recursive=True)


def test_object_stores_are_read_and_listed_through_fsspec(bucket):
    names = expand_shards(["memory://bucket/shard-*.tar"])
    assert [name.rpartition("/")[2] for name in names] == ["shard-000000.tar", "shard-000001.tar"]
    expected = same(read_shard(ShardPart(path=str(bucket / "shard-000001.tar")), counter=SkipCounter()))
    for start in (0, 2):
        samples, counter = read(names[1], start=start)
        assert (samples, counter.noticed) == (expected[start:], {})
    assert read("memory://bucket/gone.tar")[1].noticed == {"missing shard": 1}


def test_a_scheme_that_nobody_knows_is_the_users_to_mend():
    with pytest.raises(UserError, match="knows no scheme 'nowhere'"):
        read("nowhere://bucket/a.tar")


@pytest.fixture
def cached(server, tmp_path):
    """Access whose cache holds one of the server's two shards, but not both."""
    size = (server.folder / "shard-000000.tar").stat().st_size
    return replace(QUICK, cache=str(tmp_path / "cache"), cache_gigabytes=1.5 * size / 1e9)


def copies(access):
    return sorted(path.name.partition("-")[2] for path in Path(access.cache).iterdir() if path.is_file())


def test_a_cached_shard_is_fetched_once_and_the_oldest_makes_room(server, cached):
    first, second = (f"{server.url}/shard-{number:06d}.tar" for number in range(2))
    server.faults = ["drop"]
    for _ in range(3):
        assert read(first, access=cached)[0] == same(local(server))
    assert copies(cached) == ["shard-000000.tar"]
    assert read(second, access=cached)[0] == same(local(server, 1))
    assert copies(cached) == ["shard-000001.tar"]


def test_a_shard_larger_than_the_cache_is_streamed(server, cached):
    small = replace(cached, cache_gigabytes=1e-6)
    samples, counter = read(f"{server.url}/shard-000000.tar", access=small)
    assert samples == same(local(server))
    assert counter.noticed == {"shard larger than the cache": 1}


def test_a_rewritten_shard_is_another_file_of_the_cache(server, cached):
    url = f"{server.url}/shard-000000.tar"
    read(url, access=cached)
    write_tar(server.folder / "shard-000000.tar", members("new"))
    server.tag = "two"
    assert [sample.key for sample in read(url, access=cached)[0]] == ["new"]


def test_a_failed_download_leaves_nothing_behind(server, cached):
    server.faults = ["", *["500"] * 9]
    server.every = 10_000
    with pytest.raises(UserError, match="no answer"):
        read(f"{server.url}/shard-000000.tar", access=cached)
    assert copies(cached) == []


def test_many_readers_share_the_cache(server, cached):
    """Each sees whole shards, although the others' reading removes them all the time."""
    expected = [same(local(server, number)) for number in range(2)]
    wrong = []

    def work(number):
        for turn in range(6):
            which = (number + turn) % 2
            if read(f"{server.url}/shard-{which:06d}.tar", access=cached)[0] != expected[which]:
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(copies(cached)) == 1


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"attempts": 0}, {"cache_gigabytes": -1}, {"backoff": -1}])
def test_access_that_reads_nothing_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ShardAccess(**wrong)
