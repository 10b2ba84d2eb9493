"""The k-means speech tokenizer: waveform to codes and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.interface import load_speech_tokenizer, load_token2wav
from lightning_echat.nn.token2wav.kmeans import (
    MEL_BINS,
    SAMPLES_PER_CODE,
    FitReport,
    KMeansSpeechTokenizer,
    fit_kmeans,
    log_mel_blocks,
)


def voiced(seconds: float, *, seed: int) -> Tensor:
    """Harmonics of a gliding pitch under two wandering formants, with a pause: a rough vowel sequence."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * 16_000)) / 16_000
    low, high, speed = torch.rand(3, generator=generator).tolist()
    pitch = 110 + 20 * torch.sin(2 * math.pi * (0.5 + speed) * time)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / 16_000
    first = 500 + 250 * torch.sin(2 * math.pi * (1 + low) * time)
    second = 1500 + 700 * torch.sin(2 * math.pi * (1 + high) * time)
    waveform = torch.zeros_like(time)
    for harmonic in range(1, 40):
        at = harmonic * pitch
        gain = (-(((at - first) / 150) ** 2)).exp() + 0.5 * (-(((at - second) / 200) ** 2)).exp() + 0.01
        waveform += gain * torch.sin(harmonic * phase)
    waveform *= (torch.sin(2 * math.pi * 0.7 * time) > -0.8).float()
    return 0.5 * waveform / waveform.abs().max() + 1e-4 * torch.randn(len(time), generator=generator)


def distance(one: Tensor, other: Tensor) -> float:
    """Log-spectral distance over mel bins, in dB."""
    logs = (log_mel_blocks(one) - log_mel_blocks(other)).reshape(-1, MEL_BINS) * 20 / math.log(10)
    return float(logs.square().mean(1).sqrt().mean())


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.cat([log_mel_blocks(voiced(4.0, seed=seed)) for seed in range(10)])


@pytest.fixture(scope="module")
def tokenizer(blocks: Tensor) -> KMeansSpeechTokenizer:
    return fit_kmeans(blocks, codebook_size=128)


def encode_one(tokenizer: KMeansSpeechTokenizer, waveform: Tensor) -> Tensor:
    codes, lengths = tokenizer.encode(waveform[None], lengths=torch.tensor([len(waveform)]))
    assert lengths.tolist() == [codes.shape[1]]
    return codes[0]


def test_a_batch_gives_the_codes_of_its_waveforms_alone(tokenizer: KMeansSpeechTokenizer) -> None:
    waveforms = [voiced(seconds, seed=20 + index) for index, seconds in enumerate((1.0, 0.313, 2.41))]
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    batch = torch.full((3, int(lengths.max()) + 777), 0.7)  # what stands after the end must not matter
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform
    codes, code_lengths = tokenizer.encode(batch, lengths=lengths)
    for row, length, waveform in zip(codes, code_lengths, waveforms, strict=True):
        assert torch.equal(row[:length], encode_one(tokenizer, waveform))
        assert not row[length:].any()


@pytest.mark.parametrize(("samples", "codes"), [(1, 1), (639, 1), (640, 1), (641, 2), (1280, 2), (16_000, 25)])
def test_a_block_that_has_begun_counts_as_a_code(tokenizer: KMeansSpeechTokenizer, samples: int, codes: int) -> None:
    assert len(encode_one(tokenizer, voiced(1.0, seed=3)[:samples])) == codes


def test_no_audio_gives_no_codes_and_no_codes_give_no_audio(tokenizer: KMeansSpeechTokenizer) -> None:
    codes, lengths = tokenizer.encode(torch.zeros(2, 0), lengths=torch.zeros(2, dtype=torch.long))
    assert codes.shape == (2, 0)
    assert lengths.tolist() == [0, 0]
    assert tokenizer.decode(torch.empty(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_code_becomes_640_samples_that_do_not_clip(tokenizer: KMeansSpeechTokenizer, count: int) -> None:
    loud = KMeansSpeechTokenizer(tokenizer.codebook + 6.0, report=tokenizer.report)
    waveform = loud.decode(torch.arange(count))
    assert waveform.shape == (count * SAMPLES_PER_CODE,)
    assert torch.isfinite(waveform).all()
    assert float(waveform.abs().max()) <= 0.99 + 1e-6


def test_fit_and_decode_repeat_to_the_bit_whatever_the_global_seed(blocks: Tensor) -> None:
    torch.manual_seed(1)
    one = fit_kmeans(blocks, codebook_size=32, seed=5)
    first = one.decode(torch.arange(32))
    torch.manual_seed(2)
    two = fit_kmeans(blocks, codebook_size=32, seed=5)
    state = torch.get_rng_state()
    assert torch.equal(one.codebook, two.codebook)
    assert torch.equal(first, two.decode(torch.arange(32)))
    assert torch.equal(state, torch.get_rng_state())


def test_resynthesis_is_near_the_original_and_shuffled_codes_are_not(tokenizer: KMeansSpeechTokenizer) -> None:
    original = voiced(4.0, seed=50)
    codes = encode_one(tokenizer, original)
    shuffled = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    near, far = distance(original, tokenizer.decode(codes)), distance(original, tokenizer.decode(shuffled))
    assert near < 6.0
    assert far > 2.0 * near


def test_resynthesis_is_about_as_loud_as_the_original(tokenizer: KMeansSpeechTokenizer) -> None:
    original = voiced(2.0, seed=1)
    resynthesized = tokenizer.decode(encode_one(tokenizer, original))
    assert 0.5 < float((resynthesized.square().mean() / original.square().mean()).sqrt()) < 1.2


def test_most_of_the_codebook_is_used_even_with_much_digital_silence(blocks: Tensor) -> None:
    silence = log_mel_blocks(torch.zeros(640 * 3000))
    report = fit_kmeans(torch.cat([silence, blocks]), codebook_size=64).report
    assert report.blocks == len(silence) + len(blocks)
    assert 1.0 < report.perplexity <= 64.0
    assert fit_kmeans(blocks, codebook_size=64).report.perplexity > 32


def test_centroids_without_blocks_are_moved_onto_speech(blocks: Tensor) -> None:
    tokenizer = fit_kmeans(blocks, codebook_size=256)
    codes = tokenizer._nearest(blocks)
    assert len(codes.unique()) == 256


def test_more_codes_than_distinct_blocks_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="codebook_size must be from 1 to 1"):
        fit_kmeans(log_mel_blocks(torch.zeros(64_000))[5:-5], codebook_size=16)


def test_codes_of_another_codebook_are_refused(tokenizer: KMeansSpeechTokenizer) -> None:
    for codes in (torch.tensor([128]), torch.tensor([-1]), torch.zeros(1, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="codes must be"):
            tokenizer.decode(codes)


def test_what_is_saved_is_loaded_to_the_bit(tokenizer: KMeansSpeechTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "st")
    loaded = load_speech_tokenizer(tmp_path / "st")
    assert isinstance(loaded, KMeansSpeechTokenizer)
    assert torch.equal(loaded.codebook, tokenizer.codebook)
    assert loaded.report == tokenizer.report
    assert (loaded.codebook_size, loaded.code_rate, loaded.sample_rate) == (128, 25.0, 16_000)
    codes = torch.arange(10)
    assert torch.equal(load_token2wav(tmp_path / "st").decode(codes), tokenizer.decode(codes))
    assert sorted(path.name for path in (tmp_path / "st").iterdir()) == [
        "codebook.safetensors",
        "speech_tokenizer.json",
    ]


def test_a_folder_that_does_not_hold_what_it_must_is_refused(tokenizer: KMeansSpeechTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no speech tokenizer in"):
        load_speech_tokenizer(tmp_path / "nowhere")
    folder = tmp_path / "st"
    tokenizer.save(folder)
    config_path, weights = folder / "speech_tokenizer.json", folder / "codebook.safetensors"
    config = json.loads(config_path.read_text())

    for change, message in [
        ({"kind": "kmaens"}, "did you mean 'kmeans'"),
        ({"codebook_size": 64}, "with 64 rows"),
        ({"features": {}}, "fit it again"),
        ({"extra": 1}, "holds"),
    ]:
        config_path.write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_speech_tokenizer(folder)
    config_path.write_text(json.dumps(config))
    save_file({**load_file(weights), "more": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match="not just the codebook"):
        load_speech_tokenizer(folder)
    weights.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_speech_tokenizer(folder)


def test_a_codebook_of_the_wrong_shape_or_with_nan_is_refused() -> None:
    report = FitReport(blocks=0, perplexity=1.0, dead=0, seed=0)
    with pytest.raises(ValueError, match="a codebook is"):
        KMeansSpeechTokenizer(torch.zeros(4, 80), report=report)
    with pytest.raises(ValueError, match="not finite"):
        KMeansSpeechTokenizer(torch.full((4, 320), float("nan")), report=report)
