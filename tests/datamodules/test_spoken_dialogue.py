from collections import Counter
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from torch import nn

from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.mixture import SourceConfig, TaskConfig
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


class Recorder(LightningModule):
    """Learns nothing and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.trained: list[list[str]] = []
        self.validated: Counter[tuple[int, str]] = Counter()

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


def test_a_resumed_run_does_not_begin_with_the_same_batches(tokens, shards, tmp_path):
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    first = Recorder()
    running = trainer(tmp_path, max_steps=6, **options)
    running.fit(first, module(tokens, shards))
    running.save_checkpoint(tmp_path / "last.ckpt")
    second, data = Recorder(), module(tokens, shards)
    trainer(tmp_path, max_steps=12, **options).fit(second, data, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert data.resume_step == 6
    assert len(second.trained) == 6
    assert second.trained != first.trained


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
    with pytest.raises(UserError, match=r"data\.validation names no set"):
        module(tokens, shards, validation={}).test_dataloader()
    with pytest.raises(UserError, match="match nothing"):
        gone = SourceConfig(shards=[shards + "/none-*.tar"], tasks=[TaskConfig(kind="transcribe")])
        module(tokens, shards, train=[gone]).train_dataloader()
