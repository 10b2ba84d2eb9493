import hashlib
import json
import tarfile

import pytest
import torch

from lightning_echat.contracts import DialogueSample, Turn, UserError
from lightning_echat.data.decoding import decode_dialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shard_index import write_index
from lightning_echat.data.shards import ShardPart, read_shard
from lightning_echat.data.writers import ShardFile, ShardWriter, encode_audio, to_int16, write_shard


def dialogue(number: int = 0, **fields) -> DialogueSample:
    audio = 0.4 * torch.sin(torch.arange(8000 + number) / 20)
    turns = [
        Turn(role="user", text="hello", audio=audio, labels={"age": "old", "event": "cough"}),
        Turn(
            role="assistant",
            text="bless you, 奶奶.",
            audio=-audio,
            labels={"emotion": "comforting"},
            thinking="an old voice",
            speech_codes=torch.tensor([17, 203, 88]),
        ),
        Turn(role="user", audio=audio),
        Turn(role="assistant", text="yes."),
    ]
    return DialogueSample(turns=turns, key=f"d-{number:06d}", speaker="s1", voice_type="old-female", **fields)


def read(path):
    counter = SkipCounter()
    found = [decode_dialogue(stored) for stored in read_shard(ShardPart(path=str(path)), counter=counter)]
    assert not counter.noticed
    return found


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_everything_in_the_schema_reads_back_as_it_was_written(tmp_path, audio_format):
    written = dialogue()
    write_shard(tmp_path / "a.tar", [written], audio_format=audio_format)
    (back,) = read(tmp_path / "a.tar")
    assert (back.key, back.speaker, back.voice_type) == (written.key, "s1", "old-female")
    for ours, theirs in zip(written.turns, back.turns, strict=True):
        assert (ours.role, ours.text, ours.labels, ours.thinking) == (
            theirs.role, theirs.text, theirs.labels, theirs.thinking,
        )  # fmt: skip
        assert (ours.audio is None) == (theirs.audio is None)
        if ours.audio is not None and theirs.audio is not None:
            assert float((ours.audio - theirs.audio).abs().max()) <= 0.5 / 32768 + 1e-9
    codes = back.turns[1].speech_codes
    assert codes is not None
    assert codes.tolist() == [17, 203, 88]
    assert back.turns[0].speech_codes is None


def test_the_same_dialogues_give_the_same_bytes_and_members_of_a_key_stand_together(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [dialogue(n) for n in range(3)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = tar.getnames()
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    assert names[:4] == ["d-000000.json", "d-000000.0.wav", "d-000000.1.wav", "d-000000.2.wav"]


def test_an_error_leaves_neither_a_shard_nor_a_temporary_file(tmp_path):
    with pytest.raises(RuntimeError), ShardFile(tmp_path / "a.tar") as shard:
        shard.write(dialogue())
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_writer_fills_shards_in_order_and_describes_them(tmp_path):
    with ShardWriter(tmp_path, dialogues_per_shard=2) as writer:
        for number in range(5):
            writer.write(dialogue(number))
    index = json.loads((tmp_path / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [2, 2, 1]
    assert [shard["file"] for shard in index["shards"]] == [f"shard-00000{n}.tar" for n in range(3)]
    content = (tmp_path / "shard-000001.tar").read_bytes()
    assert index["shards"][1]["sha256"] == hashlib.sha256(content).hexdigest()
    assert index["shards"][1]["bytes"] == len(content)
    assert index["labels"] == {"age": {"old": 5}, "event": {"cough": 5}}
    assert index["seconds"] == pytest.approx(5 * 1.5, abs=0.01)
    assert write_index(tmp_path) == index
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: setattr(d, "key", "a.b"), "without dot"),
        (lambda d: setattr(d, "turns", []), "at least one turn"),
        (lambda d: d.turns.reverse(), "roles alternate"),
        (lambda d: d.turns[0].labels.update(age="ancient"), "unknown age 'ancient'"),
        (lambda d: d.turns[1].labels.update(emotion="cheeky"), "unknown reply emotion 'cheeky'"),
        (lambda d: setattr(d.turns[3], "text", ""), "neither text nor audio"),
        (lambda d: setattr(d.turns[2], "audio", torch.full((100,), 1.5)), "loudest sample is 1.5"),
        (lambda d: setattr(d.turns[2], "audio", torch.full((100,), float("nan"))), "loudest sample is nan"),
        (lambda d: setattr(d.turns[2], "audio", torch.zeros(2, 100)), "must be"),
    ],
)
def test_a_dialogue_that_does_not_fit_is_refused_and_nothing_of_it_is_written(tmp_path, change, message):
    bad = dialogue(1)
    change(bad)
    with ShardFile(tmp_path / "a.tar") as shard:
        shard.write(dialogue(0))
        with pytest.raises(ValueError, match=message):
            shard.write(bad)
    assert [sample.key for sample in read(tmp_path / "a.tar")] == ["d-000000"]


def test_a_key_occurs_once_in_a_shard(tmp_path):
    with ShardFile(tmp_path / "a.tar") as shard:
        shard.write(dialogue(0))
        with pytest.raises(ValueError, match="occurs twice"):
            shard.write(dialogue(0))


def test_full_scale_does_not_wrap_around():
    assert to_int16(torch.tensor([1.0, -1.0, 0.0])).tolist() == [32767, -32768, 0]
    assert encode_audio(torch.zeros(10), audio_format="flac").startswith(b"fLaC")


def test_a_folder_without_shards_or_with_other_tars_has_no_index(tmp_path):
    with pytest.raises(UserError, match="holds no shard"):
        write_index(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="is not a shard"):
        write_index(tmp_path)
    with pytest.raises(UserError, match="unknown audio format"):
        ShardFile(tmp_path / "b.tar", audio_format="mp3")  # pyright: ignore[reportArgumentType]
