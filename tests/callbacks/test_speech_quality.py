"""SpeechQuality on a stage that answers by heart, a voice that is a codebook and a recogniser told what to hear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import speech_quality
from callbacks.speech_quality import SpeechQuality
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.nn.token2wav.kmeans import fit_kmeans, log_mel_blocks
from tests.callbacks.fakes import FakeData, FakeStage, make_batch, make_trainer, reference
from tests.ranks import run_on_ranks

SPEAKS = "speech_to_speech"
TEXTS = {"a": "hello there", "b": "good night", "c": "yes", "d": "no"}
CODES = {"a": torch.arange(10) % 4, "b": torch.zeros(25, dtype=torch.long), "c": torch.arange(12) % 4}


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voice")
    torch.manual_seed(0)
    fit_kmeans(log_mel_blocks(0.1 * torch.randn(16_000)), codebook_size=4).save(folder)
    return folder


class _Listener:
    """Hears the number of codes."""

    name, independent = "stand-in", True

    def __init__(self, words: dict[int, str]) -> None:
        self.words = words

    def transcribe(self, waveforms: list[Tensor], *, sample_rate: int) -> list[str]:
        return [self.words[len(waveform) * 25 // sample_rate] for waveform in waveforms]


class _Emotions:
    name, labels = "stand-in", ("happy", "sad")

    def distributions(self, waveforms: list[Tensor], *, sample_rate: int) -> Tensor:
        return torch.tensor([[0.75, 0.25]]).expand(len(waveforms), -1)


def listening(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {10: "hello there", 25: "good", 12: "yes"}
    monkeypatch.setattr(speech_quality, "open_recogniser", lambda name: _Listener(words))
    monkeypatch.setattr(speech_quality, "open_emotion_recogniser", lambda name: _Emotions())


def spoken(*keys: str) -> PackedBatch:
    return make_batch([reference(key, task=SPEAKS) for key in keys])


def test_replies_are_spoken_heard_and_measured(tmp_path: Path, voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening(monkeypatch)
    data = FakeData(validation={"talk": [spoken("a", "b", "c", "d")], "text": [make_batch([reference("a")])]})
    trainer = make_trainer(tmp_path, SpeechQuality(token2wav=str(voice), recogniser="x", emotion_recogniser="y"))
    trainer.validate(FakeStage(TEXTS, codes=CODES), datamodule=data, verbose=False)
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert values == {
        "val/talk/speech/wer": pytest.approx(1 / 5),
        "val/talk/speech/cer": pytest.approx(6 / (11 + 10 + 3)),
        "val/talk/speech/mean_wer": pytest.approx((0 + 0.5 + 0) / 3),
        "val/talk/speech/seconds": pytest.approx((10 + 25 + 12) / 3 / 25),
        "val/talk/speech/seconds_per_word": pytest.approx((5 + 12.5 + 12) / 3 / 25),
        "val/talk/speech/silent_share": 0.25,
        "val/talk/speech/truncated_share": 0.0,
        "val/talk/speech/repeated_share": pytest.approx(1 / 3),
    }


def test_no_more_replies_are_heard_than_asked_for(tmp_path: Path, voice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening(monkeypatch)
    callback = SpeechQuality(token2wav=str(voice), recogniser="x", replies=1)
    trainer = make_trainer(tmp_path, callback)
    data = FakeData(validation={"talk": [spoken("a", "b")]})
    trainer.validate(FakeStage(TEXTS, codes=CODES), datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["val/talk/speech/wer"]) == 0.0


def test_without_a_voice_it_refuses_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs token2wav"):
        make_trainer(tmp_path, SpeechQuality()).validate(FakeStage(), datamodule=FakeData(validation={"talk": []}))


class _Ranked(FakeData):
    """Rank 0 has three replies and rank 1 none."""

    def val_dataloader(self) -> list[DataLoader]:
        assert self.trainer is not None
        batch = spoken() if self.trainer.global_rank else spoken("a", "b", "d")
        return [DataLoader([batch], batch_size=None)]  # type: ignore[arg-type]


def _on_rank(folder: Path, voice: Path) -> None:
    trainer = make_trainer(folder, SpeechQuality(token2wav=str(voice)), devices=2, strategy="ddp")
    trainer.validate(FakeStage(TEXTS, codes=CODES), datamodule=_Ranked(validation={"talk": []}), verbose=False)
    torch.save({k: float(v) for k, v in trainer.callback_metrics.items()}, folder / f"{trainer.global_rank}.pt")


def test_two_ranks_of_which_one_has_no_reply_agree(tmp_path: Path, voice: Path) -> None:
    run_on_ranks(_on_rank, tmp_path, voice)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["val/talk/speech/silent_share"] == pytest.approx(1 / 3)
    assert first["val/talk/speech/seconds"] == pytest.approx(0.7)
