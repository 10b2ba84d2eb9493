import math

import pytest
import torch

from lightning_echat.evaluation.speech_quality import (
    SpokenReply,
    delivery,
    emotion_agreement,
    error_rates,
    mel_distance,
    word_errors,
)


def reply(*codes: int, words: int = 1, finished: bool = True) -> SpokenReply:
    return SpokenReply(codes=torch.tensor(codes, dtype=torch.long), words=words, finished=finished)


def test_word_error_rates_over_words_and_over_utterances_differ() -> None:
    errors = [word_errors("Don't go, now!", "dont go now"), word_errors("yes", "no"), word_errors("", "noise")]
    rates = error_rates(errors)
    assert rates == {"wer": pytest.approx(1 / 4), "cer": pytest.approx(3 / 14), "mean_wer": 0.5, "utterances": 2}


def test_no_utterances_have_no_rate() -> None:
    assert all(math.isnan(error_rates([])[name]) for name in ("wer", "cer", "mean_wer"))
    assert all(math.isnan(value) for value in delivery([]).values())


def test_delivery_counts_silent_cut_and_stuck_replies() -> None:
    plain = reply(*range(25), words=5)
    held = reply(*range(10), *[7] * 15, words=5, finished=False)
    looping = reply(*[1, 2, 3, 4, 5] * 3, words=5)
    twice = reply(*[1, 2, 3, 4, 5] * 2, words=5)
    figures = delivery([plain, held, looping, twice, reply(finished=False)])
    assert figures == {
        "seconds": pytest.approx((25 + 25 + 15 + 10) / 4 / 25),
        "seconds_per_word": pytest.approx((25 + 25 + 15 + 10) / 4 / 25 / 5),
        "silent_share": 0.2,
        "truncated_share": 0.25,
        "repeated_share": 0.5,
    }


def test_a_louder_copy_is_as_many_decibels_away_and_a_slower_one_is_aligned_first() -> None:
    torch.manual_seed(0)
    time = torch.arange(16_000) / 16_000
    waveform = 0.1 * torch.sin(2 * torch.pi * (200 + 600 * time) * time) + 0.02 * torch.randn(16_000)
    louder = 10 ** (6 / 20) * waveform
    assert mel_distance(louder, waveform, sample_rate=16_000, aligned=True) == pytest.approx(6.0, abs=0.01)
    delayed = torch.cat([waveform[:1_600].flip(0), waveform])
    straight = mel_distance(delayed, waveform, sample_rate=16_000, aligned=True)
    assert mel_distance(delayed, waveform, sample_rate=16_000) < 0.6 * straight
    assert math.isnan(mel_distance(waveform[:10], waveform, sample_rate=16_000))


def test_emotion_is_compared_as_a_distribution() -> None:
    heard = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    figures = emotion_agreement(heard, ["happy", "comforting", "sad"], ("happy", "sad"))
    assert figures["counted"] == 2 and figures["without_label"] == 1
    assert figures["probability"] == pytest.approx((0.5 + 0.8) / 2)
    assert figures["cross_entropy"] == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert figures["mean/comforting/happy"] == pytest.approx(0.9)
    mapped = emotion_agreement(heard, ["happy", "comforting", "sad"], ("happy", "sad"), means={"comforting": "happy"})
    assert mapped["counted"] == 3 and mapped["accuracy"] == 1.0
    nobody = emotion_agreement(torch.zeros(0, 2), [], ("happy", "sad"))
    assert math.isnan(nobody["probability"]) and nobody["counted"] == 0
