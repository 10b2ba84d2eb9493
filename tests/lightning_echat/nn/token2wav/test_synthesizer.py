import json
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching, Prompt, SamplingConfig
from lightning_echat.nn.token2wav.interface import load_token2wav
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram, MelConfig
from lightning_echat.nn.token2wav.synthesizer import FlowToken2Wav
from lightning_echat.nn.token2wav.vocoder import GriffinLimVocoder, HiFiGANVocoder, VocoderConfig

MEL = MelConfig(sample_rate=22_050, fft=512, window=512, hop=128, bins=20, high=8000.0)
VOCODER = VocoderConfig(
    mel=MEL, channels=16, rates=(8, 16), kernels=(16, 32), block_kernels=(3,), block_dilations=((1, 3),)
)


def flow(mel: MelConfig = MEL) -> FlowMatching:
    torch.manual_seed(0)
    return FlowMatching(
        FlowConfig(
            codebook_size=8,
            mel=mel,
            speaker_size=4,
            encoder=CodeEncoderConfig(width=16, layers=1, heads=2, feedforward=32, stretched_layers=1),
            estimator=EstimatorConfig(channels=(16,), blocks=1, middle=1, heads=2, head_size=8),
        )
    )


def voice(*, trained: bool = True) -> FlowToken2Wav:
    return FlowToken2Wav(
        flow(),
        HiFiGANVocoder(VOCODER) if trained else None,
        sampling=SamplingConfig(steps=2, seed=3),
        prompt=Prompt(codes=torch.tensor([1, 2]), mel=torch.randn(13, 20)),
        speaker=torch.ones(4),
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_saved_voice_speaks_the_same_and_is_found_by_its_folder(tmp_path: Path, trained: bool) -> None:
    saved = voice(trained=trained)
    saved.save(tmp_path / "voice")
    loaded = load_token2wav(tmp_path / "voice")
    codes = torch.tensor([0, 7, 3, 3, 1])
    waveform = saved.decode(codes)
    assert waveform.shape == (5 * 882,)
    assert waveform.abs().max() > 0
    assert torch.equal(waveform, loaded.decode(codes))
    assert (loaded.sample_rate, loaded.code_rate, loaded.codebook_size) == (22_050, 25.0, 8)
    assert not list((tmp_path / "voice").glob("*.tmp"))


def test_no_codes_are_no_sound_and_foreign_codes_are_refused() -> None:
    speaking = voice()
    assert speaking.decode(torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        speaking.decode(torch.tensor([8]))


def test_flow_and_vocoder_of_different_features_are_not_joined() -> None:
    other = MelConfig(**{**MEL.__dict__, "high": 7000.0})
    with pytest.raises(UserError, match=r"flow writes high 7000.0 and the vocoder reads high 8000.0"):
        FlowToken2Wav(flow(other), HiFiGANVocoder(VOCODER))


def test_a_damaged_folder_is_told_in_one_line(tmp_path: Path) -> None:
    voice().save(tmp_path)
    (tmp_path / "vocoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_token2wav(tmp_path)
    description = json.loads((tmp_path / "token2wav.json").read_text())
    (tmp_path / "token2wav.json").write_text(json.dumps({**description, "flow": {"codebook_size": 8}}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_token2wav(tmp_path)


def test_griffin_lim_brings_back_the_mel_of_a_tone() -> None:
    mel = MelConfig(sample_rate=16_000, fft=1024, window=640, hop=160, bins=80, high=8000.0)
    time = torch.arange(16_000) / 16_000
    waveform = 0.3 * torch.sin(2 * torch.pi * (300 + 400 * time) * time)[None]
    before = LogMelSpectrogram(mel)(waveform)
    after = LogMelSpectrogram(mel)(GriffinLimVocoder(mel)(before))
    loud = before > -3
    assert loud.sum() > 200
    assert (before - after)[loud].abs().mean() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (8, 8)}, "product of rates"),
        ({"kernels": (16, 31)}, "even number"),
        ({"channels": 18}, "divisible by 2"),
        ({"block_dilations": ()}, "one tuple of dilations"),
    ],
)
def test_vocoder_sizes_that_cannot_be_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        VocoderConfig(**{**VOCODER.__dict__, **options})


def test_the_published_vocoder_size_is_hifi_gan_v1() -> None:
    with torch.device("meta"):
        vocoder = HiFiGANVocoder(VocoderConfig())
    # The paper's table has 13.92 M for V1.
    assert sum(p.numel() for p in vocoder.generator.parameters()) == pytest.approx(13.92e6, rel=0.005)


def test_discriminators_judge_whole_and_broken_lengths_and_their_losses_have_the_right_zero() -> None:
    torch.manual_seed(0)
    config = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 8), scales=2, scale_channels=(4, 8))
    judges = Discriminators(config)
    real = judges(torch.randn(2, 1001))
    assert len(real) == 4
    assert all(judgement.score.shape[0] == 2 and len(judgement.features) == 3 for judgement in real)
    assert float(feature_matching_loss(real, real)) == 0.0
    perfect = [type(j)(torch.ones_like(j.score), j.features) for j in real]
    caught = [type(j)(torch.zeros_like(j.score), j.features) for j in real]
    assert float(discriminator_loss(perfect, caught)) == 0.0
    assert float(adversarial_loss(perfect)) == 0.0
    assert float(adversarial_loss(caught)) == 4.0
    assert float(discriminator_loss(caught, perfect)) == 8.0
