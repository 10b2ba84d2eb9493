"""Token-to-speech trains on after a stop as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.voice import VoiceDataModule
from lightning_echat.contracts import DialogueSample, Turn, UserError, VoiceBatch
from lightning_echat.data.writers import write_shard
from tests.lightning_echat.stages.test_token2wav import flow_stage, vocoder_stage
from tests.tiny_training import make_trainer

STEPS, STOPPED_AFTER = 6, 3


class Note(Callback):
    """What each step was given."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: VoiceBatch, _: int) -> None:
        speakers = batch.speakers.tolist() if batch.speakers is not None else None
        self.batches.append((batch.codes.tolist(), batch.waveforms.numpy().tobytes(), speakers))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five dialogues in two shards; replies hum, and all but one have an embedding of their voice."""
    folder = tmp_path_factory.mktemp("voices")
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        dialogues = []
        for number in range(2 + shard):
            codes = torch.randint(8, (12 + 3 * number,), generator=generator)
            audio = 0.3 * torch.sin((0.02 + 0.05 * codes.repeat_interleave(640)).cumsum(0))
            voice = torch.randn(4, generator=generator) if shard + number else None
            reply = Turn(role="assistant", text="yes", audio=audio, speech_codes=codes, speaker_embedding=voice)
            dialogues.append(DialogueSample(turns=[Turn(role="user", text="hello"), reply], key=f"d{shard}{number}"))
        write_shard(folder / f"{shard}.tar", dialogues)
    return folder


def trained(make: Any, shards: Path, folder: Path, *, steps: int, workers: int, from_: Path | None = None, **data: Any):
    """The batches, and the trainer."""
    settings = {"rows": 2, "segment_codes": 10, "shuffle": 3, **data}
    module = VoiceDataModule(16_000, root=str(shards), train=["*.tar"], num_workers=workers, **settings)
    note, stage = Note(), make()
    trainer = make_trainer(folder, note, max_steps=steps, max_epochs=-1)
    # What is drawn before a resumed run begins must not matter.
    torch.manual_seed(0 if from_ is None else 77)
    trainer.fit(stage, datamodule=module, ckpt_path=from_)
    return note.batches, trainer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [flow_stage, vocoder_stage])
def test_a_stopped_run_goes_on_with_the_batches_and_the_noise_that_would_have_followed(
    shards: Path, tmp_path: Path, make: Any, workers: int
) -> None:
    whole, uninterrupted = trained(make, shards, tmp_path, steps=STEPS, workers=workers)
    first, stopped = trained(make, shards, tmp_path, steps=STOPPED_AFTER, workers=workers)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    rest, resumed = trained(make, shards, tmp_path, steps=STEPS, workers=workers, from_=tmp_path / "stopped.ckpt")
    assert first + rest == whole
    for name, value in uninterrupted.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name]), name


def test_embeddings_come_where_the_flow_takes_them(shards: Path, tmp_path: Path) -> None:
    of_flow, _ = trained(flow_stage, shards, tmp_path, steps=4, workers=0)
    assert any(speakers is not None and any(map(any, speakers)) for *_, speakers in of_flow)
    of_vocoder, _ = trained(vocoder_stage, shards, tmp_path, steps=4, workers=0)
    assert all(speakers is None for *_, speakers in of_vocoder)


def test_a_run_whose_batches_would_be_others_is_refused(shards: Path, tmp_path: Path) -> None:
    _, trainer = trained(flow_stage, shards, tmp_path, steps=1, workers=0)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(UserError, match=r"data\.segment_codes was 10 and is now 9"):
        trained(flow_stage, shards, tmp_path, steps=2, workers=0, from_=tmp_path / "stopped.ckpt", segment_codes=9)
