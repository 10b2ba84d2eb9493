from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from lightning.pytorch import Callback
from torch import nn

from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.stages.resuming import recount_batches
from lightning_echat.testing import tiny_tokens_config, write_dummy_shards


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return tiny_tokens_config(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return str(write_dummy_shards(Path(tmp_path_factory.mktemp("shards")), shards=2, samples_per_shard=5))


def module(tokens, shards, **options) -> SpokenDialogueDataModule:
    defaults = {
        "train": [SourceConfig(shards=[shards], tasks=[TaskConfig(kind="speech_to_text", thinking="label")])],
        "validation": {
            "words": SourceConfig(shards=[shards], tasks=[TaskConfig(kind="transcribe")]),
            "chat": SourceConfig(shards=[shards], tasks=[TaskConfig(kind="speech_to_speech")]),
        },
        "batching": BatchingConfig(tokens_per_batch=1500, max_ids=700, pool=8, shuffle=4, validation_rows=4),
        "num_workers": 0,
    }
    return SpokenDialogueDataModule(tokens=tokens, **{**defaults, **options})


def task_set(shards) -> SourceConfig:
    return SourceConfig(shards=[shards], tasks=[TaskConfig(kind="transcribe")])


class Recorder(LightningModule):
    """Learns nothing and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[list[str]] = []
        self.validated: Counter[tuple[int, str]] = Counter()
        self.windows: list[tuple[int, int]] = []
        self._begun_at = 0

    def on_before_optimizer_step(self, optimizer):
        """First and last batch of the accumulation window, counted from the window's beginning."""
        window = self.trainer.accumulate_grad_batches
        first = len(self.trained) - self._begun_at
        self.windows.append((0, first - 1) if self.trainer.fit_loop.batch_idx % window == window - 1 else (-1, -1))
        self._begun_at = len(self.trained)

    def on_load_checkpoint(self, checkpoint):
        recount_batches(checkpoint, accumulate=self.trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches

    def training_step(self, batch: PackedBatch):
        self.trained.append([reference.key for reference in batch.references])
        return self.weight * batch.log_mels.sum()

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0):
        self.validated.update((dataloader_idx, reference.key) for reference in batch.references)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder, **options) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(**{"default_root_dir": folder, "num_sanity_val_steps": 0, **quiet, **options})


def test_a_trainer_trains_by_steps_and_validates_every_dialogue_once(tokens, shards, tmp_path):
    data, model = module(tokens, shards), Recorder()
    trainer(tmp_path, max_steps=9, val_check_interval=9, check_val_every_n_epoch=None).fit(model, data)
    assert len(model.trained) == 9
    keys = [f"dialogue-{i:06d}" for i in range(10)]
    assert model.validated == Counter((place, key) for place in (0, 1) for key in keys)
    assert data.validation_names == ["words", "chat"]
    assert data.train_loader is not None and data.train_loader.health.counts["read"] > 0
    assert data.validation_loaders["chat"].health.counts["kept"] == 10


class SaveAt(Callback):
    """Saves where a batch has been trained on, and breaks off there."""

    def __init__(self, file: Path, batch: int) -> None:
        self.file, self.batch = file, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.file)
            raise Broken


class Broken(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize(("workers", "k"), [(0, 3), (0, 4), (1, 5), (2, 6)])
def test_a_resumed_run_sees_the_batches_that_would_have_followed(tokens, shards, tmp_path, workers, k):
    """Whatever was fetched ahead, between validations, and in the middle of an accumulation window."""
    options = {
        "max_steps": 5,
        "accumulate_grad_batches": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
    }
    settings = {"num_workers": workers, "validation": {"words": task_set(shards)}}
    whole = Recorder()
    trainer(tmp_path, **options).fit(whole, module(tokens, shards, **settings))
    file = tmp_path / "k.ckpt"
    first, second = Recorder(), Recorder()
    with pytest.raises(Broken):
        broken = trainer(tmp_path, callbacks=[SaveAt(file, k)], **options)
        broken.fit(first, module(tokens, shards, **settings))
    going_on = trainer(tmp_path, **options)
    going_on.fit(second, module(tokens, shards, **settings), ckpt_path=file, weights_only=True)
    assert len(whole.trained) == 10 and first.trained == whole.trained[:k]
    # The gradients of a window that was broken off are gone, so all of it comes again.
    assert second.trained == whole.trained[k - k % 2 :]
    assert second.windows == [(0, 1)] * len(second.windows) == [(0, 1)] * (5 - k // 2)


def test_a_run_goes_on_with_another_accumulation(tokens, shards, tmp_path):
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=10).fit(whole, module(tokens, shards))
    file = tmp_path / "k.ckpt"
    with pytest.raises(Broken):
        broken = trainer(tmp_path, max_steps=5, accumulate_grad_batches=2, callbacks=[SaveAt(file, 4)])
        broken.fit(first, module(tokens, shards))
    again = trainer(tmp_path, max_steps=4, accumulate_grad_batches=3)
    again.fit(second, module(tokens, shards), ckpt_path=file, weights_only=True)
    assert second.trained == whole.trained[4:10]
    assert second.windows == [(0, 2)] * 2


def test_what_is_read_once_ends_an_epoch_and_goes_on_in_its_middle(tokens, shards, tmp_path):
    once = [SourceConfig(shards=[shards], tasks=[TaskConfig(kind="transcribe")], repeat=False)]
    settings = {"train": once, "batching": BatchingConfig(tokens_per_batch=300, max_ids=300, pool=4, shuffle=4)}
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(whole, module(tokens, shards, **settings))
    keys = Counter(key for batch in whole.trained for key in batch)
    assert keys == Counter({f"dialogue-{i:06d}": 2 for i in range(10)})
    file, k = tmp_path / "k.ckpt", len(whole.trained) // 2 - 2
    with pytest.raises(Broken):
        broken = trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[SaveAt(file, k)])
        broken.fit(first, module(tokens, shards, **settings))
    again = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    again.fit(second, module(tokens, shards, **settings), ckpt_path=file, weights_only=True)
    assert second.trained == whole.trained[k:]
    assert again.current_epoch == 2


def test_another_seed_is_refused(tokens, shards, tmp_path):
    running = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    running.fit(Recorder(), module(tokens, shards))
    running.save_checkpoint(tmp_path / "k.ckpt")
    with pytest.raises(UserError, match=r"data\.seed was 0 and is now 3"):
        trainer(tmp_path, max_steps=4).fit(
            Recorder(), module(tokens, shards, seed=3), ckpt_path=tmp_path / "k.ckpt", weights_only=True
        )


def data_of_share(tokens, shards, *, rank: int, world_size: int) -> SpokenDialogueDataModule:
    """As a rank of a tensor-parallel group of two has it: the trainer says which share is the group's."""
    data = module(tokens, shards)
    share = {"rank": rank, "num_replicas": world_size}
    data.trainer = SimpleNamespace(global_step=0, distributed_sampler_kwargs=share)  # type: ignore[assignment]
    return data


def test_ranks_of_a_group_read_the_same_and_their_place_is_kept_once(tokens, shards):
    """A rank that is dealt its own would compute another batch than its group; a place kept twice is another's."""

    def keys(data: SpokenDialogueDataModule) -> list[str]:
        loader = iter(data.train_dataloader())
        return [reference.key for _ in range(2) for reference in next(loader).references]

    first, second = (data_of_share(tokens, shards, rank=rank, world_size=2) for rank in (0, 1))
    assert keys(first) == keys(data_of_share(tokens, shards, rank=0, world_size=2)) != keys(second)
    places = [data._trained.at(0) for data in (first, second)]
    four_ranks = [places[0], places[0], places[1], places[1]]
    first._ranks = SimpleNamespace(gather=lambda mine: four_ranks)  # type: ignore[assignment]
    assert len(first.state_dict()["train"]["ranks"]) == 2


def test_shares_and_epochs_are_there_to_be_logged(tokens, shards, tmp_path):
    data = module(tokens, shards)
    assert data.asked_shares == {"data/speech_to_text.label_thinking": 1.0}
    assert data.epochs == {}
    trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(Recorder(), data)
    assert data.train_loader is not None
    read = data.train_loader.health.counts["read"]
    # Counted in whole shards, of half an epoch; what waits in the buffers has been read too.
    assert read / 10 - 1 < data.epochs["data"] < read / 10 + 2


def test_yaml_fills_every_setting(tokens, shards):
    parser = ArgumentParser()
    parser.add_class_arguments(SpokenDialogueDataModule, "data")
    given = parser.parse_object(
        {
            "data": {
                "tokens": {"tokenizer": tokens.tokenizer, "text_vocabulary_size": 260, "codebook_size": 64},
                "train": [
                    {
                        "name": "speech",
                        "shards": [shards],
                        "weight": 2,
                        "tasks": [
                            {"kind": "transcribe_and_label", "labels": ["emotion", "age"], "weight": 3},
                            {"kind": "speech_to_speech", "thinking": "label", "layout": "interleaved"},
                        ],
                    }
                ],
                "validation": {"held_out": {"shards": [shards], "tasks": [{"kind": "transcribe"}]}},
                "batching": {"tokens_per_batch": 4000, "packed": True},
                "augmentation": {"time_masks": 1},
                "num_workers": 0,
            }
        }
    )
    data = parser.instantiate(given).data
    assert data.train[0].tasks[0].task.labels == ("emotion", "age")
    assert data.train[0].tasks[1].task.name == "speech_to_speech.label_thinking.interleaved"
    assert data.batching.packed and data.batching.max_ids == BatchingConfig().max_ids
    assert data.augmentation.time_masks == 1
    batch = next(iter(data.train_dataloader()))
    assert {reference.task for reference in batch.references} <= {
        "transcribe_and_label",
        "speech_to_speech.label_thinking.interleaved",
    }


def test_a_wrong_task_in_yaml_is_refused(tokens, shards):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SpokenDialogueDataModule, "data")
    source = {"shards": [shards], "tasks": [{"kind": "sing"}]}
    with pytest.raises(Exception, match="sing"):
        parser.parse_object({"data": {"tokens": {"tokenizer": "a", "text_vocabulary_size": 9}, "train": [source]}})


def test_what_is_missing_is_the_users_to_mend(tokens, shards):
    with pytest.raises(UserError, match="no train sources"):
        module(tokens, shards, train=[]).train_dataloader()
    with pytest.raises(UserError, match=r"data\.validation name no set"):
        module(tokens, shards, validation={}).test_dataloader()
    with pytest.raises(UserError, match="match nothing"):
        gone = SourceConfig(shards=[shards + "/none-*.tar"], tasks=[TaskConfig(kind="transcribe")])
        module(tokens, shards, train=[gone]).train_dataloader()
