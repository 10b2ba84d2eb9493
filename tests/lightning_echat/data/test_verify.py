import json
from copy import deepcopy

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import find_index
from lightning_echat.data.shards import ShardPart, read_samples, read_shard
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
    (findings,) = check_shards([str(broken_folder(tmp_path))])
    assert findings.counter.counts["kept"] == len(findings.usable) == 5
    assert findings.counter.counts["read"] == len(findings.entries) == 7


def test_repeated_content_is_named_and_is_no_defect(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", members("one") | members("two"))
    verify([str(tmp_path)])
    assert "a.tar two: same content as" in capsys.readouterr().out


def test_lengths_of_queries_are_counted(shards, capsys):
    verify([str(shards)])
    printed = capsys.readouterr().out
    assert "1 to 2" in printed and "2 to 4" not in printed, "dummy queries last 0.4 to 2 s"


def test_the_index_holds_what_the_audio_says_and_marks_what_cannot_be_used(tmp_path):
    path = broken_folder(tmp_path)
    with pytest.raises(UserError):
        verify([str(path)])
    index = find_index(str(path), counter=SkipCounter())
    assert index is not None
    assert [entry.defect for entry in index.samples[:3]] == ["", "broken JSON", "audio not finite"]
    assert index.samples[3].seconds == {"user": 0.5}, "its sidecar claims 2 s"
    assert (index.samples[0].codes, index.samples[0].labels) == (2, {"emotion": ["sad"]})
    stored = list(read_samples(str(path), [4], counter=SkipCounter()))
    assert [sample.key for sample in stored] == ["extra"]


def test_a_repaired_copy_is_sound_and_holds_every_usable_sample_once(tmp_path, capsys):
    """Everything broken is gone, everything else is there byte for byte, and the stated duration is true."""
    path = broken_folder(tmp_path / "in")
    verify([str(tmp_path / "in")], repair=tmp_path / "out")
    assert "4 of 8 samples" in capsys.readouterr().out.replace("\n", "")
    # Clipping is in the recording: nothing puts it right, and training takes it.
    with pytest.raises(UserError, match=r"^4 samples: noticed 1 clipped audio \([^,]*$"):
        verify([str(tmp_path / "out")])
    before = {sample.key: sample for sample in read_shard(ShardPart(path=str(path)), counter=SkipCounter())}
    copies = list(read_shard(ShardPart(path=str(tmp_path / "out" / "a.tar")), counter=SkipCounter()))
    assert [copy.key for copy in copies] == ["good", "late", "extra", "loud"]
    for copy in copies:
        assert copy.members["0.wav"] == before[copy.key].members["0.wav"]
    assert copies[0].members == before["good"].members
    assert set(copies[2].members) == {"json", "0.wav"}, "no turn names its third member"
    assert json.loads(copies[1].members["json"])["turns"][0]["seconds"] == 0.5
    with pytest.raises(UserError, match="holds shards already"):
        verify([str(tmp_path / "in")], repair=tmp_path / "out")


def test_the_index_that_verify_writes_is_the_writers_own(tmp_path):
    """Two ways to one file; a difference would be two facts in one place."""
    folder = write_dummy_shards(tmp_path, shards=2, samples_per_shard=3)
    written = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(written) == 3
    verify([str(folder)])
    assert {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")} == written


@pytest.mark.slow
def test_several_processes_find_the_same(shards):
    paths = sorted(str(path) for path in shards.glob("*.tar"))
    together = check_shards(paths, workers=2)
    assert [findings.path for findings in together] == paths
    assert [findings.entries for findings in together] == [findings.entries for findings in check_shards(paths)]


def test_an_index_that_lags_behind_is_noticed(tmp_path):
    folder = write_dummy_shards(tmp_path, shards=2, samples_per_shard=2)
    write_tar(folder / "shard-000001.tar", members("new"))
    with pytest.raises(UserError, match="index out of date"):
        verify([str(folder)])
