"""Shards on s3://, read through fsspec from a server on this machine."""

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.s3_server import S3Server
from tests.lightning_echat.data.stream_helpers import digests, keys, some, source, training

s3fs = pytest.importorskip("s3fs", reason="s3fs is the extra s3")
ACCESS = ShardAccess(backoff=0.01, attempts=4)


@pytest.fixture
def server(tmp_path, monkeypatch):
    write_dummy_shards(tmp_path / "bucket" / "corpus" / "train", shards=2, samples_per_shard=3)
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    # botocore would try five times by itself, and be slow about it.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with S3Server(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


def read(shard: str, *, start: int = 0, counter: SkipCounter | None = None) -> list[str]:
    part = ShardPart(path=shard)
    return [s.key for s in read_shard(part, start=start, counter=counter or SkipCounter(), access=ACCESS)]


def test_globs_and_folders_name_shards(server):
    shards = [f"s3://bucket/corpus/train/shard-{number:06d}.tar" for number in range(2)]
    assert expand_shards(["s3://bucket/corpus/*/shard-*.tar"], access=ACCESS) == shards
    assert expand_shards(["s3://bucket/corpus/train/"], access=ACCESS) == shards
    with pytest.raises(UserError, match="match nothing"):
        expand_shards(["s3://bucket/corpus/none-*.tar"], access=ACCESS)


def test_training_reads_what_it_reads_from_a_folder(server, tokens):
    here = training(tokens, [source(server.folder / "bucket" / "corpus" / "train")])
    there = training(tokens, [source("s3://bucket/corpus/train/")], access=ACCESS)
    batches = some(there, 3)
    assert keys(batches) and digests(batches) == digests(some(here, 3))


def test_a_shard_that_was_rewritten_since_it_was_listed_is_read_as_it_is(server):
    shard = "s3://bucket/corpus/train/shard-000000.tar"
    assert shard in expand_shards(["s3://bucket/corpus/train/*.tar"], access=ACCESS)
    write_dummy_shards(server.folder / "bucket" / "corpus" / "train", shards=1, samples_per_shard=5)
    assert len(read(shard)) == 5


def test_with_an_index_reading_begins_at_the_sample(server):
    shard = "s3://bucket/corpus/train/shard-000000.tar"
    assert read(shard, start=2) == ["dialogue-000002"]
    assert server.reads[-1][0].endswith(".tar") and not server.reads[-1][1].startswith("bytes=0-")


def test_an_answer_of_500_is_overcome_and_a_missing_object_is_counted(server):
    counter = SkipCounter()
    server.failures = 1
    assert len(read("s3://bucket/corpus/train/shard-000000.tar", counter=counter)) == 3
    assert server.failures == 0
    assert read("s3://bucket/corpus/train/gone.tar", counter=counter) == []
    assert counter.noticed.get("missing shard") == 1
