"""`echat data tokenize`: codes into shards."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_echat.contracts import DialogueSample, Turn, UserError
from lightning_echat.corpus.tokenize import find_shards, tokenize
from lightning_echat.data.writers import ShardWriter
from lightning_echat.nn.token2wav.interface import load_speech_tokenizer


def dialogue(number: int, *, reply_audio: bool = True) -> DialogueSample:
    """One exchange of noise bursts of changing colour."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(12_000 + 100 * number, generator=generator)
    audio = 0.2 * torch.cumsum(noise, 0) / torch.cumsum(noise, 0).abs().max() + 0.02 * noise.clamp(-3, 3)
    turns = [
        Turn(role="user", text="hello", audio=audio),
        Turn(role="assistant", text="hi", audio=audio.flip(0) if reply_audio else None),
    ]
    return DialogueSample(turns=turns, key=f"dialogue-{number:03d}")


def write(folder: Path, numbers: range, **options: Any) -> None:
    with ShardWriter(folder, dialogues_per_shard=2) as writer:
        for number in numbers:
            writer.write(dialogue(number, **options))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write(tmp_path / "corpus" / "train", range(4))
    write(tmp_path / "corpus" / "validation", range(4, 6))
    write(tmp_path / "corpus" / "text", range(6, 8), reply_audio=False)
    return tmp_path / "corpus"


def run(corpus: Path | list[str], out: Path, **options: Any) -> None:
    given = [str(corpus)] if isinstance(corpus, Path) else corpus
    options = {"fit": True, "codebook_size": 16, "workers": 1, **options}
    tokenize(given, out, speech_tokenizer=out.parent / "st", **options)


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info)) is not None}


def turns(shard: Path, key: str) -> list[dict[str, Any]]:
    return json.loads(members(shard)[f"{key}.json"])["turns"]


def edit(shard: Path, name: str, content: bytes) -> None:
    """Replace or add a member."""
    changed = {**members(shard), name: content}
    with tarfile.open(shard, "w") as tar:
        for path, data in sorted(changed.items()):
            file = shard.parent / "member"
            file.write_bytes(data)
            tar.add(file, arcname=path)
            file.unlink()


def test_replies_get_the_codes_of_their_audio_and_nothing_else_changes(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out)
    tokenizer = load_speech_tokenizer(tmp_path / "st")
    assert tokenizer.codebook_size == 16
    before = members(corpus / "train" / "shard-000001.tar")
    after = members(out / "train" / "shard-000001.tar")
    assert list(before) == list(after)
    assert all(before[name] == after[name] for name in before if name.endswith("wav"))
    user, assistant = turns(out / "train" / "shard-000001.tar", "dialogue-003")
    audio = dialogue(3).turns[1].audio
    assert audio is not None
    quantized = torch.round(audio * 32768) / 32768
    codes, _ = tokenizer.encode(quantized[None], lengths=torch.tensor([len(audio)]))
    assert "codes" not in user
    assert assistant.pop("codes") == codes[0].tolist()
    assert [user, assistant] == turns(corpus / "train" / "shard-000001.tar", "dialogue-003")


def test_every_split_keeps_its_folder_and_gets_an_index(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    for split, samples in (("train", 4), ("validation", 2), ("text", 2)):
        assert json.loads((tmp_path / "out" / split / "index.json").read_text())["samples"] == samples


def test_turns_without_codes_and_unreadable_dialogues_are_counted_by_reason(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = corpus / "train" / "shard-000000.tar"
    edit(shard, "dialogue-000.1.wav", b"no audio at all")
    sidecar = json.loads(members(shard)["dialogue-001.json"])
    sidecar["turns"][1] |= {"seconds": 9.0, "codes": [1, 2]}
    edit(shard, "dialogue-001.json", json.dumps(sidecar).encode())
    edit(shard, "zzz.json", b"{")
    run(corpus, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "tokenization.json").read_text())["shards"]["train/shard-000000.tar"]
    assert record["skipped"] == {"unreadable audio": 1, "codes and duration differ": 1}
    assert record["left_out"] == {"broken JSON": 1}
    assert (record["dialogues"], record["turns"]) == (2, 0)
    assert "codes" not in turns(tmp_path / "out" / "train" / "shard-000000.tar", "dialogue-001")[1]
    printed = capsys.readouterr().out
    assert "2 no audio" in printed
    assert "1 dialogues left out (1 broken JSON)" in printed


def test_a_rerun_does_only_what_is_missing_or_out_of_date(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(corpus, out)
    shards = sorted(out.rglob("*.tar"))
    contents = {shard: shard.read_bytes() for shard in shards}
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[0].unlink()
    (out / "train" / "shard-000007.tar.tmp").write_bytes(b"half a shard")
    (corpus / "validation" / "shard-000000.tar").touch()
    run(corpus, out)
    assert {shard: shard.read_bytes() for shard in sorted(out.rglob("*.tar"))} == contents
    redone = {shard.relative_to(out).as_posix() for shard in shards if shard.stat().st_mtime_ns != times[shard]}
    assert redone == {shards[0].relative_to(out).as_posix(), "validation/shard-000000.tar"}
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_processes_change_nothing(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "one")
    run(corpus, tmp_path / "two", workers=2)
    for shard in (tmp_path / "one").rglob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.relative_to(tmp_path / "one")).read_bytes()


def test_output_inside_the_corpus_is_no_input_of_the_next_run(corpus: Path) -> None:
    run(corpus, corpus / "tokenized")
    run(corpus, corpus / "tokenized")
    assert sorted(path.name for path in (corpus / "tokenized").iterdir() if path.is_dir()) == [
        "text",
        "train",
        "validation",
    ]


def test_patterns_and_folders_of_shards_go_straight_into_the_output(corpus: Path, tmp_path: Path) -> None:
    found = find_shards([str(corpus / "train" / "*.tar")], out=tmp_path / "out")
    assert [name.as_posix() for name in found] == ["shard-000000.tar", "shard-000001.tar"]
    assert found == find_shards([str(corpus / "train")], out=tmp_path / "out")


def test_mistakes_end_in_one_line(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for given, options, message in [
        ([str(tmp_path / "nowhere")], {}, "match nothing"),
        (corpus, {"fit": False}, "no speech tokenizer in"),
        ([str(corpus / "train"), str(corpus / "validation")], {}, "would both become"),
        ([str(corpus / "text")], {}, "no assistant audio"),
    ]:
        with pytest.raises(UserError, match=message):
            run(given, out, **options)
    with pytest.raises(UserError, match="written over itself"):
        run([str(corpus / "train" / "*.tar")], corpus / "train")
    run(corpus, out)
    with pytest.raises(UserError, match="16 codes, not 32"):
        run(corpus, out, codebook_size=32)
    shutil.rmtree(tmp_path / "st")
    with pytest.raises(UserError, match="another speech tokenizer"):
        run(corpus, out, seed=1)
    (out / "tokenization.json").unlink()
    with pytest.raises(UserError, match="not made by echat data tokenize"):
        run(corpus, out)


def test_a_damaged_shard_is_refused_and_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    shard = corpus / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:60_000])
    with pytest.raises(UserError, match="cannot be copied whole"):
        run(corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "train" / "shard-000000.tar").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
