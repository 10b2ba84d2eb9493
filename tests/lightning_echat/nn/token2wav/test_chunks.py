"""Sound made in pieces is the sound made at once."""

import pytest
import torch
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.chunks import ChunkConfig, WaveformStream
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching
from lightning_echat.nn.token2wav.kmeans import KMeansSpeechTokenizer, fit_kmeans, log_mel_blocks
from lightning_echat.nn.token2wav.mel import MelConfig
from lightning_echat.nn.token2wav.synthesizer import FlowToken2Wav
from lightning_echat.nn.token2wav.vocoder import HiFiGANVocoder, VocoderConfig
from lightning_echat.testing import dummy_audio


@pytest.fixture(scope="module")
def voice() -> KMeansSpeechTokenizer:
    blocks = torch.cat([log_mel_blocks(dummy_audio(3.0, seed=seed)) for seed in range(4)])
    return fit_kmeans(blocks, codebook_size=32)


@pytest.fixture(scope="module")
def codes(voice) -> Tensor:
    audio = dummy_audio(4.0, seed=9)
    return voice.encode(audio[None], lengths=torch.tensor([len(audio)]))[0][0]


def flow_voice(*, hop: int) -> FlowToken2Wav:
    """Flow and vocoder of random weights: what it says is decided by codes and noise alike."""
    mel = MelConfig(sample_rate=16_000, fft=1024, window=640, hop=hop, bins=20, high=8000.0)
    torch.manual_seed(0)
    flow = FlowConfig(
        codebook_size=8,
        mel=mel,
        speaker_size=0,
        encoder=CodeEncoderConfig(width=16, layers=1, heads=2, feedforward=32, stretched_layers=1, dropout=0.0),
        estimator=EstimatorConfig(channels=(16, 16), blocks=1, middle=1, heads=2, head_size=8),
    )
    vocoder = VocoderConfig(
        mel=mel, channels=16, rates=(8, hop // 8), kernels=(16, hop // 4), block_kernels=(3,), block_dilations=((1, 3),)
    )
    return FlowToken2Wav(FlowMatching(flow), HiFiGANVocoder(vocoder))


def streamed(voice, codes: Tensor, config: ChunkConfig, *, at_once: int = 1) -> list[Tensor]:
    stream = WaveformStream(voice, config)
    pieces = []
    for start in range(0, len(codes), at_once):
        pieces += stream.push(codes[start : start + at_once].tolist())
    return pieces + stream.finish()


def log_spectral_distance(one: Tensor, other: Tensor) -> float:
    """Mean over frames of the root mean square difference in dB."""

    def decibels(waveform: Tensor) -> Tensor:
        spectrum = torch.stft(waveform, 512, 128, 512, torch.hann_window(512), return_complex=True)
        return 20 * spectrum.abs().clamp_min(1e-4).log10()

    return float((decibels(one) - decibels(other)).square().mean(0).sqrt().mean())


def jumps_at_joins(waveform: Tensor, pieces: list[Tensor]) -> Tensor:
    """[joins] the largest step between samples around each join."""
    joins = torch.tensor([len(piece) for piece in pieces]).cumsum(0)[:-1]
    steps = waveform.diff().abs()
    return torch.stack([steps[join - 3 : join + 2].max() for join in joins])


def test_pieces_together_are_the_whole(voice, codes):
    whole = voice.decode(codes)
    pieces = streamed(voice, codes, ChunkConfig())
    together = torch.cat(pieces)
    assert together.shape == whole.shape and len(pieces) > 3
    assert log_spectral_distance(together, whole) < 0.1
    # Cut without context, it would be another.
    alone = torch.cat(streamed(voice, codes, ChunkConfig(context=0, look_ahead=0, fade=0.0)))
    assert log_spectral_distance(alone, whole) > 0.5


class Forgetful:
    """Speaks every stretch as if it were the beginning of the answer."""

    def __init__(self, voice: FlowToken2Wav) -> None:
        self.voice = voice
        self.codebook_size, self.code_rate, self.sample_rate = voice.codebook_size, voice.code_rate, voice.sample_rate

    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        return self.voice.decode(codes)


@pytest.mark.parametrize(("hop", "share", "slack"), [(160, 0.3, 0.02), (256, 0.75, 0.2)])
def test_a_flow_draws_the_same_noise_in_pieces_as_at_once(hop, share, slack):
    """Where a code is 4 frames; and, half a frame off at most, where it is 2.5 of them."""
    voice = flow_voice(hop=hop)
    codes = torch.randint(8, (90,), generator=torch.Generator().manual_seed(0))
    whole = voice.decode(codes)
    pieces = streamed(voice, codes, ChunkConfig())
    together = torch.cat(pieces)
    forgotten = torch.cat(streamed(Forgetful(voice), codes, ChunkConfig()))
    near, far = log_spectral_distance(together, whole), log_spectral_distance(forgotten, whole)
    assert near < share * far
    allowed = jumps_at_joins(whole, pieces) + slack * whole.diff().abs().max()
    assert (jumps_at_joins(together, pieces) <= allowed).all()


def test_joins_do_not_click(voice, codes):
    whole = voice.decode(codes)
    pieces = streamed(voice, codes, ChunkConfig())
    allowed = jumps_at_joins(whole, pieces) + 0.02 * whole.diff().abs().max()
    assert (jumps_at_joins(torch.cat(pieces), pieces) <= allowed).all()
    hard = streamed(voice, codes, ChunkConfig(context=0, look_ahead=0, fade=0.0))
    allowed = jumps_at_joins(whole, hard) + 0.02 * whole.diff().abs().max()
    assert not (jumps_at_joins(torch.cat(hard), hard) <= allowed).all()


def test_it_does_not_matter_how_codes_come(voice, codes):
    one = streamed(voice, codes, ChunkConfig())
    for at_once in (7, 18, len(codes)):
        other = streamed(voice, codes, ChunkConfig(), at_once=at_once)
        assert [len(piece) for piece in other] == [len(piece) for piece in one]
        assert torch.equal(torch.cat(other), torch.cat(one))


def test_a_piece_comes_as_soon_as_its_look_ahead_is_there(voice, codes):
    stream = WaveformStream(voice, ChunkConfig(first=4, codes=6, look_ahead=3))
    came = [sum(len(piece) for piece in stream.push([code])) // 640 for code in codes[:16].tolist()]
    assert came == [0] * 6 + [4] + [0] * 5 + [6] + [0] * 3
    assert [len(piece) // 640 for piece in stream.finish()] == [6]
    assert WaveformStream(voice).finish() == []


class Ramp:
    """Says of each code where it stands in its window: shows what is decoded, and what is mixed."""

    codebook_size, code_rate, sample_rate = 100, 25.0, 100

    def __init__(self) -> None:
        self.windows: list[list[int]] = []
        self.starts: list[int] = []

    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        self.starts.append(start)
        self.windows.append(codes.tolist())
        return torch.full((len(codes),), float(len(self.windows))).repeat_interleave(4)


def test_windows_hold_context_piece_and_look_ahead_and_mix_over_the_fade():
    voice = Ramp()
    config = ChunkConfig(first=2, codes=3, context=2, look_ahead=1, fade=0.03)
    pieces = streamed(voice, torch.arange(8), config)
    assert voice.windows == [[0, 1, 2], [0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7]]
    assert voice.starts == [0, 0, 3]
    assert pieces[0].tolist() == [1.0] * 8
    assert pieces[1].tolist() == [1.25, 1.5, 1.75] + [2.0] * 9
    assert pieces[2].tolist() == [2.25, 2.5, 2.75] + [3.0] * 9


def test_chunks_that_cannot_be_cut_are_refused(voice):
    with pytest.raises(UserError, match="at least one"):
        ChunkConfig(first=0)
    with pytest.raises(UserError, match="at least 0"):
        ChunkConfig(context=-1)
    with pytest.raises(UserError, match=r"fade of 0\.5 s is longer than the look-ahead, 0\.20 s"):
        WaveformStream(voice, ChunkConfig(fade=0.5))
