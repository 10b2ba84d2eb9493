"""Training on shards that are broken or that change under it."""

import os

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import write_index
from lightning_echat.data.shards import ShardPart, read_shard
from lightning_echat.data.verify import verify
from lightning_echat.testing import tiny_tokens_config
from tests.lightning_echat.data.data_helpers import members, write_tar
from tests.lightning_echat.data.stream_helpers import some, source, training


def shard(path, *, count, prefix="a", broken=0):
    content = {}
    for place in range(count):
        options = {"sidecar": b"{"} if place < broken else {}
        content |= members(f"{prefix}{place}", **options)
    return write_tar(path, content)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_skips_than_allowed_stop_a_training_in_one_line(tmp_path, workers):
    """Otherwise a run goes on for days on a fraction of its data."""
    path = shard(tmp_path / "a.tar", count=100, broken=30)
    tokens = tiny_tokens_config(tmp_path / "t")
    with pytest.raises(UserError, match=r"broken JSON .*max_skip_share 0\.1;") as stopped:
        some(training(tokens, [source(path)], workers=workers, max_skip_share=0.1), 50)
    assert "\n" not in str(stopped.value)
    assert some(training(tokens, [source(path)], workers=workers, max_skip_share=0.5), 3)


def test_a_shard_replaced_while_it_is_read_is_read_to_its_old_end(tmp_path):
    path = shard(tmp_path / "a.tar", count=300)
    samples = read_shard(ShardPart(path=str(path)), counter=(counter := SkipCounter()))
    first = next(samples)
    shard(tmp_path / "new.tar", count=5, prefix="b").replace(path)
    assert [first.key, *(sample.key for sample in samples)] == [f"a{place}" for place in range(300)]
    assert not counter.noticed


def test_a_shard_cut_short_while_it_is_read_is_counted(tmp_path):
    path = shard(tmp_path / "a.tar", count=300)
    samples = read_shard(ShardPart(path=str(path)), counter=(counter := SkipCounter()))
    next(samples)
    os.truncate(path, path.stat().st_size // 2)
    assert 100 < len(list(samples)) < 299
    assert counter.noticed["damaged shard"] == 1


def test_a_training_survives_a_shard_that_is_written_again_between_epochs(tmp_path):
    """With an index of the old content beside it, which must not be believed."""
    path = shard(tmp_path / "a.tar", count=40)
    write_index(tmp_path)
    loader = training(tiny_tokens_config(tmp_path / "t"), [source(path)])
    batches = iter(loader)
    seen = {reference.key for _ in range(3) for reference in next(batches).references}
    assert all(key.startswith("a") for key in seen)
    shard(tmp_path / "new.tar", count=30, prefix="b").replace(path)
    later = {reference.key for _ in range(12) for reference in next(batches).references}
    assert any(key.startswith("b") for key in later)


def test_repair_of_another_format_names_what_to_do(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"task": "<TRANSCRIBE>"}\n')
    (tmp_path / "a.reference.yaml").write_text("format: raw\ndata: rows.jsonl\n")
    with pytest.raises(UserError, match="echat data pack"):
        verify([str(tmp_path / "a.reference.yaml")], repair=tmp_path / "clean")
    with pytest.raises(UserError, match="1 of 1 samples would be skipped"):
        verify([str(tmp_path / "a.reference.yaml")])
