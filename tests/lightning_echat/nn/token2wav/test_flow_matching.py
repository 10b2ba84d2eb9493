import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig, _by_key, _stretch
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching, Prompt, SamplingConfig, frame_noise
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram, MelConfig

MEL = MelConfig(sample_rate=16_000, fft=512, window=512, hop=160, bins=8, high=8000.0)
TINY = FlowConfig(
    codebook_size=4,
    mel=MEL,
    speaker_size=0,
    encoder=CodeEncoderConfig(width=16, layers=1, heads=2, feedforward=32, stretched_layers=1, dropout=0.0),
    estimator=EstimatorConfig(channels=(16, 16), blocks=1, middle=1, heads=2, head_size=8),
)


def tiny(**options) -> FlowMatching:
    torch.manual_seed(0)
    return FlowMatching(FlowConfig(**{**TINY.__dict__, **options})).eval()


def test_a_relative_position_is_the_distance_from_query_to_key() -> None:
    length = 5
    # Column k of the scores stands for the distance length - 1 - k.
    by_distance = torch.arange(length - 1, -length, -1).expand(1, 2, length, -1).float()
    expected = torch.arange(length)[:, None] - torch.arange(length)
    assert torch.equal(_by_key(by_distance)[0, 1], expected.float())


def test_stretching_reads_a_row_as_torch_does_and_no_other_rows_padding() -> None:
    x = torch.randn(2, 7, 3)
    x[1, 5:] = 1e6
    stretched = _stretch(x, torch.tensor([7, 5]), torch.tensor([24, 17]))
    for row, (length, frames) in enumerate(((7, 24), (5, 17))):
        alone = torch.nn.functional.interpolate(x[row, :length].T[None], size=frames, mode="linear")[0].T
        torch.testing.assert_close(stretched[row, :frames], alone)
        assert not stretched[row, frames:].any()


def test_frames_cover_the_codes_at_any_rate() -> None:
    assert MEL.frames(10, code_rate=25.0) == 40
    cosyvoice = MelConfig()
    assert cosyvoice.frames(25, code_rate=25.0) == 87
    assert 87 * 256 >= 22_050 > 86 * 256


def test_mels_have_a_frame_a_hop_and_know_the_level() -> None:
    mel = LogMelSpectrogram(MEL)
    waveform = torch.sin(torch.arange(16_000) * 2 * torch.pi * 1000 / 16_000)[None]
    loud, soft = mel(waveform), mel(0.1 * waveform)
    assert loud.shape == (1, 100, 8)
    band = int(loud[0, 50].argmax())
    assert float(loud[0, 50, band] - soft[0, 50, band]) == pytest.approx(2.3026, abs=1e-3)


@pytest.mark.parametrize("predicts", ["velocity", "mel"])
def test_a_flow_learns_which_mel_a_code_stands_for(predicts: str) -> None:
    """Codes 0 to 3 have one flat mel each; after a minute's worth of steps the flow writes them."""
    flow = tiny(condition_dropout=0.1, prompt_share=0.0, predicts=predicts).train()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3)
    levels = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        codes = torch.randint(4, (16, 6), generator=generator)
        mels = levels[codes].repeat_interleave(4, dim=1)[..., None].expand(-1, -1, 8)
        loss, number = flow.loss_sum(codes, torch.full((16,), 6), mels, torch.full((16,), 24), generator=generator)
        optimizer.zero_grad()
        (loss / number).backward()
        optimizer.step()
    codes = torch.tensor([0, 0, 0, 3, 3, 3])
    made = flow.eval().generate(codes, SamplingConfig(steps=8, guidance=0.0))
    assert made.shape == (24, 8)
    assert made[2:8].mean() < -0.9
    assert made[-8:-2].mean() > 0.9


def test_the_seed_decides_the_noise_and_nothing_else_does() -> None:
    flow, codes = tiny(), torch.tensor([0, 1, 2, 3])
    first = flow.generate(codes, SamplingConfig(steps=2, seed=1))
    torch.rand(100)
    assert torch.equal(first, flow.generate(codes, SamplingConfig(steps=2, seed=1)))
    assert not torch.allclose(first, flow.generate(codes, SamplingConfig(steps=2, seed=2)))


def test_a_frame_has_the_same_noise_whichever_it_is_drawn_with() -> None:
    whole = frame_noise(500, 10, seed=1)
    assert torch.equal(frame_noise(20, 10, seed=1, first=130), whole[130:150])
    for other in (frame_noise(500, 10, seed=2), frame_noise(500, 10, seed=1, stream=1), whole.roll(1, 0)):
        assert (other == whole).float().mean() < 0.001
    many = frame_noise(5000, 80, seed=-1).double()
    # Of 400,000 normal numbers; five standard errors each.
    assert abs(many.mean()) < 0.008 and abs(many.var() - 1) < 0.012
    assert abs(many.pow(3).mean()) < 0.031 and abs(many.pow(4).mean() - 3) < 0.08
    neighbours = (
        (many[:, :-1] * many[:, 1:]).mean(),
        (many[:-1] * many[1:]).mean(),
        (many[:, :40] * many[:, 40:]).mean(),
    )
    assert max(abs(float(value)) for value in neighbours) < 0.012


def test_guidance_moves_away_from_what_fits_without_conditions() -> None:
    flow, codes = tiny(), torch.tensor([0, 1, 2, 3])
    plain, guided, more = (
        flow.generate(codes, SamplingConfig(steps=1, schedule="linear", guidance=g)) for g in (0.0, 0.5, 1.0)
    )
    # One step is linear in the guidance.
    torch.testing.assert_close(more - plain, 2 * (guided - plain), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(plain, guided)


def test_rows_without_conditions_have_the_loss_of_no_condition() -> None:
    flow = tiny(condition_dropout=0.999999, prompt_share=0.0)
    mels, lengths = torch.randn(2, 24, 8), torch.tensor([24, 24])
    losses = [
        flow.loss_sum(codes, torch.tensor([6, 6]), mels, lengths, generator=torch.Generator().manual_seed(0))[0]
        for codes in (torch.zeros(2, 6, dtype=torch.long), torch.full((2, 6), 3))
    ]
    assert losses[0] == losses[1]


def test_what_stands_behind_the_end_of_a_row_counts_for_nothing() -> None:
    flow = tiny(prompt_share=0.0)
    codes, mels = torch.tensor([[0, 1, 2, 3]]), torch.randn(1, 16, 8)

    def loss(codes: torch.Tensor, mels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return flow.loss_sum(
            codes, torch.tensor([2]), mels, torch.tensor([8]), generator=torch.Generator().manual_seed(0)
        )

    changed_codes, changed = codes.clone(), mels.clone()
    changed_codes[:, 2:], changed[:, 8:] = 0, 7.0
    assert loss(codes, mels)[1] == 8 * 8
    torch.testing.assert_close(loss(codes, mels)[0], loss(changed_codes, changed)[0])


def test_an_utterance_comes_out_the_same_alone_and_in_a_padded_batch() -> None:
    flow = tiny(speaker_size=4)
    lengths, frame_lengths = torch.tensor([7, 3, 5]), torch.tensor([28, 11, 20])
    codes, points, speakers = torch.randint(4, (3, 7)), 5 * torch.randn(3, 8, 28), torch.randn(3, 8)
    times = torch.tensor([0.1, 0.5, 0.9])

    def velocities(rows: slice, frames: int, valid: torch.Tensor | None) -> torch.Tensor:
        code_lengths = lengths[rows]
        encoded = flow.encoder(codes[rows, : int(code_lengths.max())], code_lengths, frame_lengths[rows], frames=frames)
        conditions = [points[rows, :, :frames], encoded.transpose(1, 2)]
        conditions += [speakers[rows, :, None].expand(-1, -1, frames), torch.zeros_like(conditions[0])]
        return flow.estimator(torch.cat(conditions, dim=1), times[rows], valid)

    together = velocities(slice(None), 28, torch.arange(28) < frame_lengths[:, None])
    for row, frames in enumerate(frame_lengths.tolist()):
        for valid in (torch.ones(1, frames, dtype=torch.bool), None):
            alone = velocities(slice(row, row + 1), frames, valid)[0]
            torch.testing.assert_close(together[row, :, :frames], alone, atol=2e-5, rtol=1e-4)
        assert not together[row, :, frames:].any()


def test_the_mel_of_a_recording_is_the_same_alone_and_in_a_padded_batch() -> None:
    mel, waveforms, lengths = LogMelSpectrogram(MEL), 0.1 * torch.randn(2, 6400), torch.tensor([6400, 4321])
    waveforms[1, 4321:] = 0.0
    together = mel(waveforms, lengths)
    for row, length in enumerate(lengths.tolist()):
        frames = length // MEL.hop
        torch.testing.assert_close(together[row, :frames], mel(waveforms[row : row + 1, :length])[0, :frames])


def test_a_prompt_is_continued_and_not_repeated() -> None:
    flow, codes = tiny(), torch.tensor([0, 1, 2, 3])
    made = [
        flow.generate(codes, SamplingConfig(steps=2), prompt=Prompt(codes=torch.tensor([1, 1]), mel=mel))
        for mel in (torch.zeros(8, 8), torch.ones(8, 8))
    ]
    assert made[0].shape == (16, 8)
    assert not torch.allclose(made[0], made[1])


def test_a_speaker_changes_the_voice_only_of_a_flow_that_knows_speakers() -> None:
    flow, codes = tiny(speaker_size=4), torch.tensor([0, 1])
    one, other = (flow.generate(codes, SamplingConfig(steps=2), speaker=torch.eye(4)[i]) for i in (0, 1))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match="speaker_size 0"):
        tiny().generate(codes, SamplingConfig(steps=2), speaker=torch.ones(4))


def test_the_defaults_have_the_size_of_the_released_flow() -> None:
    """CosyVoice-300M-25Hz publishes flow.pt with 104.9 M parameters in float32 (420 MB)."""
    with torch.device("meta"):
        flow = FlowMatching(FlowConfig())
    assert sum(parameter.numel() for parameter in flow.parameters()) == 104_874_752


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FlowConfig(condition_dropout=1.0), "condition_dropout must be in"),
        (lambda: FlowConfig(mel_scale=0.0), "must be positive"),
        (lambda: SamplingConfig(steps=0), "steps must be at least 1"),
        (lambda: EstimatorConfig(channels=(20,)), "multiples of 8"),
        (lambda: MelConfig(hop=2000), "hop 2000 <= window"),
        (lambda: MelConfig(high=12_000.0), "half of 22050 Hz"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(build, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        build()
    assert "\n" not in str(refused.value)
