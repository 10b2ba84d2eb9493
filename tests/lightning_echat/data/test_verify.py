from copy import deepcopy

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.verify import check_shards, verify
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.data_helpers import SIDECAR, members, wav, write_tar


def test_sound_shards_are_reported_and_nothing_is_raised(shards, capsys):
    verify([str(shards)])
    printed = capsys.readouterr().out
    assert "3 shards, 24 samples, 24 usable, 7 speakers" in printed
    assert "gender" in printed


def broken_folder(tmp_path):
    late = deepcopy(SIDECAR)
    late["turns"][0]["seconds"] = 2.0
    content = (
        members("good") | members("json", sidecar=b"{") | members("nan", audio=wav(value=float("nan"), subtype="FLOAT"))
    )
    content |= members("late", sidecar=late) | members("extra") | {"extra.7.wav": b"x"}
    content |= members("loud", audio=wav(value=1.0))
    path = write_tar(tmp_path / "a.tar", [*content.items(), *members("good").items()])
    cut = write_tar(tmp_path / "b.tar", members("cut"))
    cut.write_bytes(cut.read_bytes()[:2000])
    return path


def test_every_defect_is_named_with_shard_and_key(tmp_path, capsys):
    broken_folder(tmp_path)
    with pytest.raises(UserError, match=r"3 of 8 samples would be skipped"):
        verify([str(tmp_path)])
    printed = capsys.readouterr().out
    for key, defect in [
        ("json", "broken JSON"),
        ("nan", "audio not finite"),
        ("late", "duration differs (turn 0 has 0.50 s, its sidecar says 2.00)"),
        ("extra", "member that no turn names"),
        ("loud", "clipped audio"),
        ("good", "duplicate key"),
        ("cut", "missing member"),
    ]:
        assert f".tar {key}: {defect}" in printed
    assert "b.tar: damaged shard" in printed


def test_kept_and_skipped_add_up(tmp_path):
    report = check_shards([str(broken_folder(tmp_path))])
    assert report.counter.counts["kept"] == 5
    assert report.counter.counts["read"] == 7
    assert not report.sound


def test_an_index_that_lags_behind_is_noticed(tmp_path):
    folder = write_dummy_shards(tmp_path, shards=2, samples_per_shard=2)
    write_tar(folder / "shard-000001.tar", members("new"))
    with pytest.raises(UserError, match="index out of date"):
        verify([str(folder)])
