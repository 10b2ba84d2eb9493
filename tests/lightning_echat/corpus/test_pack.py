import json

import numpy as np
import pytest
import soundfile

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.corpus.pack import pack
from lightning_echat.data.decoding import decode_dialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, read_shard


def tone(path, *, rate=SAMPLE_RATE, seconds=0.5, channels=1):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)


def good(**fields):
    return {
        "turns": [
            {"role": "user", "text": "hello", "audio": "wav/a.wav", "labels": {"emotion": "sad"}},
            {"role": "assistant", "text": "hello, sir.", "labels": {"emotion": "comforting"}, "thinking": "a man"},
        ],
        **fields,
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wav").mkdir()
    tone(tmp_path / "wav" / "a.wav")
    tone(tmp_path / "wav" / "b.flac", rate=44_100, channels=2)
    (tmp_path / "wav" / "noise.wav").write_text("this is no audio")
    return tmp_path


def write(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def seconds(dialogue):
    return dialogue.turns[0].audio.numel() / SAMPLE_RATE


def read(out):
    paths = sorted(out.glob("*.tar"))
    return [
        decode_dialogue(stored)
        for path in paths
        for stored in read_shard(ShardPart(path=str(path)), counter=SkipCounter())
    ]


def test_a_users_dialogues_and_audio_become_shards_that_read_back(folder):
    other_rate = good(key="mine", speaker="anna", voice_type="studio")
    other_rate["turns"][0]["audio"] = "wav/b.flac"
    text_only = {"turns": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]}
    pack(write(folder, [good(), other_rate, "", text_only]), folder / "out", dialogues_per_shard=2)
    first, second, third = read(folder / "out")
    assert [first.key, second.key, third.key] == ["manifest-00000001", "mine", "manifest-00000004"]
    assert (second.speaker, second.voice_type) == ("anna", "studio")
    assert first.turns[1].thinking == "a man"
    assert first.turns[0].labels == {"emotion": "sad"}
    assert seconds(first) == seconds(second) == 0.5
    assert third.turns[0].audio is None
    index = json.loads((folder / "out" / "index.json").read_text())
    assert (index["samples"], len(index["shards"])) == (3, 2)
    assert not (folder / "out" / "skipped.jsonl").exists()


def test_bad_rows_are_counted_by_reason_and_listed_with_their_line(folder, capsys):
    def broken(**turn):
        row = good()
        row["turns"][0] |= turn
        return row

    rows = {
        "broken JSON": "{not json",
        "missing audio": broken(audio="wav/none.wav"),
        "unreadable audio": broken(audio="wav/noise.wav"),
        "unknown label": broken(labels={"emotion": "hapy"}),
        "unknown label set": broken(labels={"mood": "sad"}),
        "role order": broken(role="assistant"),
        "no turns": {"text": "hello"},
        "broken sidecar": "[1, 2]",
        "duplicate key": good(key="same"),
        "bad key": good(key="a.b"),
        "empty turn": {"turns": [{"role": "user"}]},
        "audio too long": broken(audio="wav/b.flac"),
    }
    tone(folder / "wav" / "b.flac", seconds=3)
    pack(write(folder, [good(key="same"), *rows.values()]), folder / "out", max_seconds=2.0)
    listed = [json.loads(line) for line in (folder / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in listed] == [(n, reason) for n, reason in enumerate(rows, start=2)]
    out = capsys.readouterr().out
    assert "1 dialogues" in out
    assert "12 skipped" in out
    assert "line 2: broken JSON" in out
    assert len(read(folder / "out")) == 1


def test_nothing_usable_is_the_users_mistake_and_leaves_no_shard(folder):
    with pytest.raises(UserError, match="nothing that can be packed: 2 broken JSON"):
        pack(write(folder, ["a", "b"]), folder / "out")
    with pytest.raises(UserError, match="it is empty"):
        pack(write(folder, []), folder / "out")
    assert not list((folder / "out").glob("*.tar*"))


def test_a_missing_manifest_and_a_used_folder_are_refused(folder):
    with pytest.raises(UserError, match="does not exist"):
        pack(folder / "none.jsonl", folder / "out")
    manifest = write(folder, [good()])
    pack(manifest, folder / "out")
    with pytest.raises(UserError, match="--overwrite"):
        pack(manifest, folder / "out")
    pack(write(folder, [good(), good()]), folder / "out", overwrite=True)
    assert len(read(folder / "out")) == 2


def test_audio_that_resampling_pushes_over_full_scale_is_scaled_not_lost(folder):
    square = np.sign(np.sin(2 * np.pi * 300 * np.arange(48_000) / 48_000))
    soundfile.write(folder / "wav" / "a.wav", square, 48_000)
    pack(write(folder, [good()]), folder / "out")
    audio = read(folder / "out")[0].turns[0].audio
    assert audio is not None
    assert 0.9 < float(audio.abs().max()) <= 1.0
