from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_echat.checkpoints.token2wav import token2wav
from lightning_echat.contracts import UserError, VoiceBatch
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.discriminators import DiscriminatorConfig
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig
from lightning_echat.nn.token2wav.interface import load_token2wav
from lightning_echat.nn.token2wav.mel import MelConfig
from lightning_echat.nn.token2wav.synthesizer import FlowToken2Wav
from lightning_echat.nn.token2wav.vocoder import VocoderConfig
from lightning_echat.stages.token2wav import FlowStage, VocoderLosses, VocoderStage
from tests.ranks import run_on_ranks
from tests.tiny_training import make_trainer

MEL = MelConfig(sample_rate=16_000, fft=512, window=512, hop=160, bins=16, high=7000.0)


def flow_stage(**options: Any) -> FlowStage:
    torch.manual_seed(0)
    config = FlowConfig(
        codebook_size=8,
        mel=MEL,
        mel_mean=-5.0,
        mel_scale=2.0,
        speaker_size=4,
        encoder=CodeEncoderConfig(width=16, layers=1, heads=2, feedforward=32, stretched_layers=1, dropout=0.0),
        estimator=EstimatorConfig(channels=(16,), blocks=1, middle=1, heads=2, head_size=8),
    )
    return FlowStage(flow=config, optimizer=partial(torch.optim.AdamW, lr=3e-3), **options)


def vocoder_stage(**options: Any) -> VocoderStage:
    torch.manual_seed(0)
    config = VocoderConfig(
        mel=MEL, channels=16, rates=(8, 20), kernels=(16, 40), block_kernels=(3,), block_dilations=((1, 3),)
    )
    judges = DiscriminatorConfig(periods=(2, 3), period_channels=(4, 4), scales=1, scale_channels=(4, 4))
    defaults = {"losses": VocoderLosses(adversarial_from=2), "optimizer": partial(torch.optim.AdamW, lr=3e-3)}
    return VocoderStage(vocoder=config, discriminators=judges, **{**defaults, **options})


def batch(number: int, rows: int = 2) -> VoiceBatch:
    """Codes that are tones."""
    generator = torch.Generator().manual_seed(number)
    codes = torch.randint(8, (rows, 10), generator=generator)
    pitch = 200.0 + 300.0 * codes.repeat_interleave(640, dim=1)
    waveforms = 0.3 * torch.sin((2 * torch.pi * pitch / 16_000).cumsum(1))
    return VoiceBatch(
        codes=codes,
        code_lengths=torch.full((rows,), 10),
        waveforms=waveforms,
        lengths=torch.full((rows,), 6_400),
    )


class Voices(LightningDataModule):
    """Ready batches: rank r takes every second of them, and in validation the second rank has nothing."""

    sample_rate = 16_000
    validation_names = ("dialogue",)

    def __init__(self, steps: int, *, broken: int | None = None) -> None:
        super().__init__()
        self.steps, self.broken = steps, broken
        self.codebook_size: int | None = None

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [batch(number, rows=1 + number % 2) for number in range(rank, world * self.steps, world)]
        if self.broken is not None and rank == world - 1:
            batches[self.broken].waveforms[0, 100] = float("nan")
        return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        rows = 0 if self.trainer.global_rank else 3
        return DataLoader([batch(999, rows=rows)], batch_size=None)  # pyright: ignore[reportArgumentType]


def fit(stage: LightningModule, folder: Path, data: Voices, **options: Any) -> Trainer:
    trainer = make_trainer(folder, **{"max_epochs": 1, **options})
    trainer.fit(stage, datamodule=data)
    return trainer


@pytest.mark.parametrize("make", [flow_stage, vocoder_stage])
def test_a_stage_learns_and_its_steps_are_counted_once(tmp_path: Path, make) -> None:
    before = fit(make(), tmp_path, Voices(1)).callback_metrics["val/dialogue/loss"]
    trainer = fit(make(), tmp_path, Voices(40))
    assert trainer.global_step == 40
    assert trainer.callback_metrics["val/dialogue/loss"] < 0.9 * before


def test_the_vocoder_is_judged_from_the_step_on_that_yaml_names(tmp_path: Path) -> None:
    trainer = fit(vocoder_stage(), tmp_path, Voices(2))
    assert "train/loss/adversarial" not in trainer.callback_metrics
    stage = vocoder_stage()
    stage.configure_model()
    assert stage.discriminators is not None
    untouched = [p.detach().clone() for p in stage.discriminators.parameters()]
    trainer = fit(stage, tmp_path, Voices(4))
    assert {"train/loss/adversarial", "train/loss/feature_matching", "train/loss/discriminators"} <= set(
        trainer.callback_metrics
    )
    assert all(p.requires_grad for p in stage.discriminators.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(stage.discriminators.parameters(), untouched, strict=True))


@pytest.mark.parametrize("make", [flow_stage, vocoder_stage])
def test_a_step_that_is_not_finite_is_dropped_and_counted(tmp_path: Path, make) -> None:
    stage = make()
    trainer = fit(stage, tmp_path, Voices(3, broken=1))
    assert trainer.callback_metrics["train/skipped_steps"] >= 1
    assert all(torch.isfinite(p).all() for p in stage.parameters())


def test_a_run_of_nothing_but_broken_steps_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_echat.stages.token2wav._MOST_SKIPPED", 1)
    with pytest.raises(UserError, match="not finite"):
        fit(flow_stage(), tmp_path, Voices(2, broken=0))


def test_what_does_not_agree_is_refused(tmp_path: Path) -> None:
    data = Voices(1)
    data.sample_rate = 22_050
    with pytest.raises(UserError, match="22050 and the mel's 16000"):
        fit(flow_stage(), tmp_path, data)


def test_the_data_is_told_how_many_codes_the_flow_knows(tmp_path: Path) -> None:
    data = Voices(1)
    fit(flow_stage(), tmp_path, data)
    assert data.codebook_size == 8


def test_flow_and_vocoder_of_two_runs_become_a_voice_and_start_the_next_run(tmp_path: Path) -> None:
    for name, stage in (("flow", flow_stage()), ("vocoder", vocoder_stage())):
        trainer = fit(stage, tmp_path / name, Voices(1))
        trainer.save_checkpoint(tmp_path / name / "last.ckpt")
    token2wav(tmp_path / "flow", tmp_path / "voice", vocoder=tmp_path / "vocoder")
    voice = load_token2wav(tmp_path / "voice")
    assert isinstance(voice, FlowToken2Wav)
    assert voice.decode(torch.tensor([1, 2, 3])).shape == (3 * 640,)
    for source in (tmp_path / "flow", tmp_path / "voice"):
        stage = flow_stage(init_from=str(source))
        stage.configure_model()
        assert stage.flow is not None
        for key, value in voice.flow.state_dict().items():
            assert torch.equal(stage.flow.state_dict()[key], value)
    with pytest.raises(UserError, match="holds a flow, not a vocoder"):
        token2wav(tmp_path / "flow", tmp_path / "other", vocoder=tmp_path / "flow")
    with pytest.raises(UserError, match="another size"):
        _wider(tmp_path / "vocoder")
    of_mels = FlowStage(flow=replace(flow_stage().config, predicts="mel"), init_from=str(tmp_path / "flow"))
    with pytest.raises(UserError, match="predicts the velocity, not the mel"):
        of_mels.configure_model()


def _wider(run: Path) -> None:
    stage = VocoderStage(
        vocoder=VocoderConfig(
            mel=MEL, channels=32, rates=(8, 20), kernels=(16, 40), block_kernels=(3,), block_dilations=((1, 3),)
        ),
        init_from=str(run),
    )
    stage.configure_model()


def _on_rank(folder: Path, broken: int | None) -> None:
    for make in (flow_stage, vocoder_stage):
        stage = make()
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=make is vocoder_stage)
        trainer = fit(stage, folder, Voices(4, broken=broken), devices=2, strategy=strategy)
        torch.save(
            {"weights": stage.state_dict(), "loss": trainer.callback_metrics["val/dialogue/loss"]},
            folder / f"{make.__name__}{trainer.global_rank}.pt",
        )


@pytest.mark.parametrize("broken", [None, 2])
def test_two_ranks_end_with_the_same_finite_weights_though_one_met_a_broken_batch(tmp_path: Path, broken) -> None:
    run_on_ranks(_on_rank, tmp_path, broken)
    for name in ("flow_stage", "vocoder_stage"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        assert first["loss"] == second["loss"]
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), key
            assert torch.isfinite(value).all(), key
