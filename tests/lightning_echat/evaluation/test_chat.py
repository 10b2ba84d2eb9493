"""A tiny model is asked in speech and answers in speech."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch

from lightning_echat import cli
from lightning_echat.contracts import SAMPLE_RATE, GeneratedReply, PackedBatch, UserError
from lightning_echat.decoding import DecodingConfig
from lightning_echat.evaluation import chat as chat_module
from lightning_echat.evaluation.chat import chat
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from lightning_echat.testing import CODEBOOK_SIZE, dummy_audio, save_tiny_checkpoint, tiny_model
from lightning_echat.tokens.thinking import write_label_thinking

# An untrained model whose head is its embedding repeats what it read last: it ends its text at once, and its speech
# never.
CUT = DecodingConfig(max_text_ids=12, max_speech_ids=20)
THINKING = write_label_thinking("where to", {"age": "old", "event": "cough"}, "comforting")


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> dict[int, Path]:
    """Speech tokenizers fit on noise, by size."""
    torch.manual_seed(0)
    blocks = log_mel_blocks(0.1 * torch.randn(6 * SAMPLE_RATE))
    folders = {}
    for size in (CODEBOOK_SIZE, 32):
        folders[size] = Path(tmp_path_factory.mktemp(f"voice{size}"))
        fit_kmeans(blocks, codebook_size=size).save(folders[size])
    return folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokens, voices) -> Path:
    tokens = replace(tokens, speech_tokenizer=str(voices[CODEBOOK_SIZE]))
    return save_tiny_checkpoint(Path(tmp_path_factory.mktemp("run")) / "last.ckpt", tiny_model(tokens), tokens)


@pytest.fixture
def questions(tmp_path) -> list[Path]:
    """Two of them, at different rates."""
    paths = []
    for number, rate in enumerate((16_000, 24_000)):
        paths.append(tmp_path / f"question{number}.wav")
        soundfile.write(paths[-1], dummy_audio(1.0, seed=number).numpy(), rate)
    return paths


def script(monkeypatch: pytest.MonkeyPatch, text: str, codes: int = 5) -> list[PackedBatch]:
    """Let the model say `text` to everything; the prompts that it is given."""
    asked: list[PackedBatch] = []

    def say(model, batch: PackedBatch, tokenizer, config, **_) -> list[GeneratedReply]:
        asked.append(batch)
        return [
            GeneratedReply(
                reference=batch.references[0],
                text_ids=tokenizer.encode(text),
                text=text,
                speech_codes=torch.arange(codes),
                timings={"prefill": 0.25, "total": 0.5},
            )
        ]

    monkeypatch.setattr(chat_module, "generate", say)
    return asked


def test_a_question_in_speech_has_an_answer_in_speech(tmp_path, checkpoint, questions, capsys):
    out = tmp_path / "new" / "answer.wav"
    chat(checkpoint, questions[:1], out, json=True, thinking="none", decoding=CUT)
    (answer,) = json.loads(capsys.readouterr().out)["turns"]
    # The boundary and 19 codes, 25 a second.
    audio, rate = soundfile.read(out)
    assert rate == SAMPLE_RATE and len(audio) == 19 * 640
    assert abs(audio).max() > 1e-4
    assert answer["audio"] == str(out) and answer["seconds"] == pytest.approx(0.76)
    assert answer["query"] == str(questions[0])
    assert answer["finished"] is False
    assert set(answer["timings"]) == {"features", "prefill", "total", "token2wav"}
    assert [path.name for path in out.parent.iterdir()] == ["answer.wav"]


@pytest.mark.parametrize("layout", ["sequential", "interleaved"])
def test_a_streamed_answer_is_told_as_it_comes_and_is_the_same(tmp_path, checkpoint, questions, capsys, layout):
    options: dict = {"thinking": "none", "decoding": CUT, "layout": layout}
    chat(checkpoint, questions, tmp_path / "whole.wav", json=True, **options)
    whole = json.loads(capsys.readouterr().out)["turns"]
    chat(checkpoint, questions, tmp_path / "streamed.wav", json=True, stream=True, **options)
    streamed = json.loads(capsys.readouterr().out)["turns"]
    for one, other in zip(whole, streamed, strict=True):
        assert (one["text"], one["seconds"], one["finished"]) == (other["text"], other["seconds"], other["finished"])
        assert one["stream"] == {} and other["stream"]["timing"]["codes"] == 19
        sound = [event["samples"] for event in other["stream"]["events"] if event["kind"] == "audio"]
        assert len(sound) == 2 and sum(sound) == 19 * 640
        assert other["stream"]["timing"]["first_audio"] > other["stream"]["timing"]["first_code"] > 0
        assert soundfile.info(other["audio"]).frames == 19 * 640
    first, second = (turn["stream"]["timing"] for turn in streamed)
    assert first["reused_ids"] == 0 < second["reused_ids"]


def test_streamed_events_are_printed_in_their_order(tmp_path, checkpoint, questions, capsys):
    chat(checkpoint, questions[:1], tmp_path / "answer.wav", stream=True, thinking="none", decoding=CUT)
    shown = capsys.readouterr().out
    places = [shown.index(words) for words in ("as it comes", "codes     ", "audio     ", "done", "reply", "stream  ")]
    assert places == sorted(places)
    assert "0.40 s of sound" in shown and "first sound after" in shown and "stalls" in shown


def test_the_same_question_has_the_same_answer(tmp_path, checkpoint, questions):
    for name in ("a.wav", "b.wav"):
        chat(checkpoint, questions[:1], tmp_path / name, thinking="none", decoding=CUT)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_the_second_turn_is_asked_with_the_first_as_history(
    monkeypatch, tmp_path, checkpoint, questions, capsys, tokenizer
):
    asked = script(monkeypatch, THINKING + "go left")
    chat(checkpoint, questions, tmp_path / "answer.wav", json=True)
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert [turn["text"] for turn in turns] == ["go left", "go left"]
    assert [Path(turn["audio"]).name for turn in turns] == ["answer-1.wav", "answer-2.wav"]
    assert all(soundfile.info(turn["audio"]).frames == 5 * 640 for turn in turns)
    first, second = (batch.input_ids[0].tolist() for batch in asked)
    assert [batch.log_mels.shape[0] for batch in asked] == [1, 2]
    # A second at 16 kHz; as many samples at 24 kHz are two thirds of it.
    assert asked[1].log_mel_lengths.tolist() == [100, 66]
    # What was thought is not carried along, what was said is.
    said = [*tokenizer.encode("go left"), tokenizer.vocabulary.end_of_text]
    assert second[: len(first) + len(said)] == first + said
    assert torch.equal(asked[1].log_mels[0], asked[0].log_mels[0])


def test_thinking_is_told_in_its_parts(monkeypatch, tmp_path, checkpoint, questions, capsys):
    script(monkeypatch, THINKING + "go left")
    chat(checkpoint, questions[:1], tmp_path / "answer.wav", json=True)
    (answer,) = json.loads(capsys.readouterr().out)["turns"]
    assert answer["thinking"] == {
        "transcript": "where to",
        "labels": {"age": "old", "event": "cough"},
        "reply_emotion": "comforting",
        "written": THINKING.removeprefix("<think>").removesuffix("<think end>"),
        "well_formed": True,
    }
    assert answer["finished"] is True
    chat(checkpoint, questions[:1], tmp_path / "answer.wav")
    shown = capsys.readouterr().out
    for words in ("where to", "age old, event cough", "comforting", "go left", "answer.wav (0.2 s)", "total 0.50 s"):
        assert words in shown
    assert "cut short" not in shown and "thinks" not in shown


def test_thinking_that_cannot_be_parsed_is_shown_as_it_stands(monkeypatch, checkpoint, questions, capsys):
    """A released model thinks in sentences of its own, which no parser of ours reads."""
    script(monkeypatch, "<think>ein alter Mann fragt nach dem Weg<think end>go left")
    chat(checkpoint, questions[:1], thinking="natural")
    shown = capsys.readouterr().out
    assert "thinks  ein alter Mann fragt nach dem Weg\n" in shown and "reply   go left\n" in shown


def test_an_answer_without_codes_stays_silent(monkeypatch, tmp_path, checkpoint, questions, capsys):
    script(monkeypatch, "nothing that parses", codes=0)
    chat(checkpoint, questions[:1], tmp_path / "answer.wav")
    shown = capsys.readouterr().out
    assert "(no speech)" in shown and "(nothing that could be parsed)" in shown
    assert not (tmp_path / "answer.wav").exists()


def test_the_command_takes_several_questions(monkeypatch, tmp_path, checkpoint, questions, capsys):
    script(monkeypatch, THINKING + "go left")
    words = ["chat", "--checkpoint", str(checkpoint.parent), "--out", str(tmp_path / "answer.wav"), "--json"]
    cli.main([*words, "--audio", str(questions[0]), "--audio", str(questions[1])])
    assert len(json.loads(capsys.readouterr().out)["turns"]) == 2


def test_without_a_place_for_sound_the_answer_is_text(monkeypatch, tmp_path, tokens, tokenizer, questions, capsys):
    """A model whose speech tokenizer is elsewhere can be asked all the same."""
    asked = script(monkeypatch, THINKING + "go left", codes=0)
    mute = save_tiny_checkpoint(tmp_path / "mute.ckpt", tiny_model(tokens), tokens)
    chat(mute, questions[:1], json=True)
    (answer,) = json.loads(capsys.readouterr().out)["turns"]
    assert (answer["text"], answer["audio"]) == ("go left", None)
    assert asked[0].references[0].task == "speech_to_text.label_thinking"


def test_a_speech_tokenizer_of_another_size_is_refused(tmp_path, checkpoint, questions, voices):
    with pytest.raises(UserError, match="has 32 codes but the model speaks 64"):
        chat(checkpoint, questions, tmp_path / "answer.wav", speech_tokenizer=voices[32])


def test_what_is_missing_or_wrong_is_the_users_to_mend(tmp_path, tokens, checkpoint, questions):
    out = tmp_path / "answer.wav"
    with pytest.raises(UserError, match="no audio"):
        chat(checkpoint, [], out)
    with pytest.raises(UserError, match="no checkpoint"):
        chat(tmp_path / "none", questions, out)
    with pytest.raises(UserError, match=r"ends in \.wav"):
        chat(checkpoint, questions, tmp_path / "answer")
    with pytest.raises(UserError, match="no speech tokenizer in"):
        chat(checkpoint, questions, out, speech_tokenizer=tmp_path)
    mute = save_tiny_checkpoint(tmp_path / "mute.ckpt", tiny_model(tokens), tokens)
    with pytest.raises(UserError, match="give --speech_tokenizer"):
        chat(mute, questions, out)
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"no wav")
    with pytest.raises(UserError, match=r"noise\.wav: unreadable audio"):
        chat(checkpoint, [noise], out)
    assert not out.exists()


def test_a_question_that_cannot_be_read_is_found_before_anything_is_answered(
    monkeypatch, tmp_path, checkpoint, questions
):
    asked = script(monkeypatch, "yes")
    with pytest.raises(FileNotFoundError):
        chat(checkpoint, [questions[0], tmp_path / "gone.wav"], tmp_path / "answer.wav")
    assert asked == []
