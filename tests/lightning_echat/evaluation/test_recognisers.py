"""Recognisers on tiny random models and on tones; what pocketsphinx understands is measured, not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from lightning_echat.contracts import DialogueSample, Turn, UserError
from lightning_echat.data.writers import write_shard
from lightning_echat.evaluation import evaluate_speech as speech_module
from lightning_echat.evaluation import resynthesis as resynthesis_module
from lightning_echat.evaluation.evaluate_speech import evaluate_speech, read_list
from lightning_echat.evaluation.recognisers import PocketsphinxRecogniser, open_emotion_recogniser, open_recogniser
from lightning_echat.evaluation.resynthesis import resynthesis
from lightning_echat.evaluation.speech_quality import SpeakerSimilarity
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from tests.lightning_echat.evaluation.tiny_recognisers import save_emotion_model, save_features, sizes

WAVEFORM = 0.1 * torch.sin(torch.arange(8_000) / 5)


@pytest.fixture
def speech_model(tmp_path: Path) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2ForCTC

    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4}))
    no_marks: Any = {"bos_token": None, "eos_token": None}
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **no_marks).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes(), vocab_size=5, pad_token_id=0))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0])
    model.save_pretrained(tmp_path)
    save_features(tmp_path)
    return tmp_path


@pytest.fixture
def emotion_model(tmp_path: Path) -> Path:
    return save_emotion_model(tmp_path / "emotions")


def test_a_hugging_face_model_hears_at_its_own_rate(speech_model: Path) -> None:
    listener = open_recogniser(str(speech_model))
    assert listener.independent
    assert listener.transcribe([WAVEFORM, WAVEFORM[:6_000]], sample_rate=16_000) == ["B", "B"]


def test_labels_of_a_classifier_that_mean_one_of_ours_are_added_up(emotion_model: Path) -> None:
    (emotion_model / "labels.json").write_text(json.dumps({"FROH": "happy", "JOY": "happy"}))
    listener = open_emotion_recogniser(str(emotion_model))
    assert listener.labels == ("angry", "happy")
    heard = listener.distributions([WAVEFORM, WAVEFORM], sample_rate=16_000)
    expected = torch.tensor([1.0, 0.0, 0.0]).softmax(0)
    torch.testing.assert_close(heard[1], torch.stack([expected[0], expected[1] + expected[2]]), atol=1e-4, rtol=0)


def test_a_name_that_is_no_model_is_told_in_one_line(tmp_path: Path) -> None:
    for build in (open_recogniser, open_emotion_recogniser, SpeakerSimilarity):
        with pytest.raises(UserError, match="cannot load") as refused:
            build(str(tmp_path))
        assert "\n" not in str(refused.value)


def test_speakers_are_compared_by_the_cosine_of_their_embeddings(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **sizes(), tdnn_dim=(16, 16, 16), tdnn_kernel=(5, 3, 1), tdnn_dilation=(1, 1, 1), xvector_output_dim=8
    )
    Wav2Vec2ForXVector(config).save_pretrained(tmp_path)
    save_features(tmp_path)
    similarity = SpeakerSimilarity(str(tmp_path))
    noise = 0.1 * torch.randn(8_000)
    assert similarity([(WAVEFORM, WAVEFORM)], sample_rate=16_000) == pytest.approx(1.0, abs=1e-5)
    assert similarity([(WAVEFORM, noise)], sample_rate=16_000) < 0.99999


def test_pocketsphinx_says_which_words_it_cannot_hear() -> None:
    pytest.importorskip("pocketsphinx", reason="needs pip install 'lightning-echat[recogniser]'")
    listener = PocketsphinxRecogniser(["Good night, xyzzyq.", "good day"])
    assert listener.unknown == ["xyzzyq"]
    assert all(
        set(text.split()) <= {"good", "night", "day"} for text in listener.transcribe([WAVEFORM], sample_rate=16_000)
    )


class _Heard:
    name, independent = "stand-in", True

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)

    def transcribe(self, waveforms, *, sample_rate: int) -> list[str]:
        return [self.texts.pop(0) for _ in waveforms]


def test_listed_wav_files_are_scored_and_stored(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(speech_module, "open_recogniser", lambda *a, **k: _Heard("one two", "wrong"))
    soundfile.write(tmp_path / "a.wav", WAVEFORM.numpy(), 16_000)
    rows = [{"wav": "a.wav", "text": "One two!"}, {"wav": "a.wav", "text": "three four", "reference": "a.wav"}]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    evaluate_speech(tmp_path / "list.jsonl", out=tmp_path / "out" / "scores.json")
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (stored["wer"], stored["mean_wer"], stored["mel_distance_db"]) == (0.5, 0.5, 0.0)
    assert [each["errors"] for each in stored["each"]] == [0, 2]
    assert "wer: 0.5" in capsys.readouterr().out


def test_a_wrong_list_is_told_with_its_line(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.txt", "a.wav|yes\nno bar", "line 2: write wav|text"),
        ("a.jsonl", '{"wav": "a.wav"}', "line 1: text is missing"),
        ("b.jsonl", "[1]", "line 1: write an object"),
        ("c.txt", "\n", "lists nothing"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as refused:
            read_list(tmp_path / name)
        assert message in str(refused.value)
    (tmp_path / "a.txt").write_text("sub/a.wav | yes, no")
    assert read_list(tmp_path / "a.txt")[0].text == "yes, no"


def test_resynthesis_stands_beside_the_recordings_in_the_report(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    audio = 0.1 * torch.randn(6_400)
    codec = fit_kmeans(log_mel_blocks(audio), codebook_size=4)
    codec.save(tmp_path / "codec")
    codes = codec.encode(audio[None], lengths=torch.tensor([6_400]))[0][0]
    spoken = Turn(role="assistant", text="good day", audio=audio, speech_codes=codes)
    silent = Turn(role="assistant", text="good day")
    dialogues = [
        DialogueSample(turns=[Turn(role="user", text="hi"), turn], key=f"k{number}")
        for number, turn in enumerate([spoken, silent, spoken])
    ]
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "a.tar", dialogues)
    (tmp_path / "report.json").write_text(json.dumps({"speech": {"replies": 3}, "seconds": 1.0}))
    heard = _Heard("good", "good day", "good day", "good day")
    monkeypatch.setattr(resynthesis_module, "open_recogniser", lambda *a, **k: heard)
    resynthesis([str(tmp_path / "shards")], tmp_path / "codec", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] == 1.0 and report["speech"]["replies"] == 3
    figures = report["speech"]["resynthesis"]
    assert (figures["items"], figures["wer"], figures["wer_of_recordings"]) == (2, 0.25, 0.0)
    assert figures["mean_wer_difference"][0] == 0.25
    assert json.loads((tmp_path / "resynthesis.json").read_text()) == figures
    (tmp_path / "none").mkdir()
    write_shard(tmp_path / "none" / "a.tar", [dialogues[1]])
    with pytest.raises(UserError, match="no reply with text, audio and codes"):
        resynthesis([str(tmp_path / "none")], tmp_path / "codec", tmp_path)
