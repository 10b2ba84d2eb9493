from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_echat.data.log_mel import LogMel
from lightning_echat.testing import dummy_audio

FIXTURE = Path(__file__).resolve().parents[4] / "shared" / "reference" / "parity" / "log_mel.safetensors"


@pytest.mark.skipif(not FIXTURE.is_file(), reason=f"the reference's log-mel is not at {FIXTURE}")
def test_it_equals_the_reference():
    fixture = load_file(FIXTURE)
    assert torch.allclose(LogMel()(fixture["waveform_16k"]), fixture["log_mel"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 16000])
def test_there_is_a_frame_for_each_hop(samples):
    assert LogMel()(torch.randn(samples)).shape == (samples // 160, 80)


def test_a_quieter_voice_has_lower_frames():
    audio = dummy_audio(1.0)
    loud, quiet = LogMel()(audio), LogMel()(audio / 10)
    # A tenth of the amplitude is 2 decades of power, a quarter of which is what Whisper's scale keeps.
    assert torch.allclose(loud - quiet, torch.full_like(loud, 0.5), atol=0.02)


def test_silence_is_finite():
    assert torch.isfinite(LogMel()(torch.zeros(1000))).all()


def test_bins_can_be_chosen():
    assert LogMel(mel_bins=128)(torch.randn(1600)).shape == (10, 128)
