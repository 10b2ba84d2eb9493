"""The LightningDataModule of every stage: a mixture of sources to train on, named sets to validate on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning import LightningDataModule

from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.clip_features import make_log_mels
from lightning_echat.data.dialogue_stream import DialogueLoader, ReadingConfig, TrainingStream, ValidationStream
from lightning_echat.data.log_mel import LogMel
from lightning_echat.data.mixture import SourceConfig, check_sources
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import below
from lightning_echat.tokens.dialogue_template import TokensConfig


class SpokenDialogueDataModule(LightningDataModule):
    """Streams dialogues from shards.

    Training never ends by itself: give `trainer.max_steps`, and `trainer.val_check_interval` in steps with
    `check_val_every_n_epoch: null`.
    """

    def __init__(
        self,
        tokens: TokensConfig,
        root: str = "",
        train: list[SourceConfig] | None = None,
        validation: dict[str, SourceConfig] | None = None,
        batching: BatchingConfig | None = None,
        augmentation: AugmentationConfig | None = None,
        num_workers: int = 1,
        seed: int = 0,
        expand_history: bool = True,
        max_skip_share: float = 0.05,
        max_seconds: float = 30.0,
        mels_on_device: bool = False,
        access: ShardAccess | None = None,
    ) -> None:
        """Take the settings; shards are looked up when the loaders are made.

        Args:
            tokens: What data and model agree on; linked from the model.
            root: Folder or URL that relative patterns of shards start from.
            train: Sources of the training mixture.
            validation: Name -> set, each with exactly one task; every dialogue is seen exactly once.
            batching: Sizes of batches.
            augmentation: Altering of mels in training; null leaves them as they are.
            num_workers: Reading processes per rank and loader; 0 reads in the trainer's own process.
            seed: Decides every draw.
            expand_history: Each exchange of a longer dialogue is a sample of its own.
            max_skip_share: Share of unusable samples past which the run stops.
            max_seconds: Longest clip.
            mels_on_device: Workers hand over waveforms, and log-mels are made of whole batches on the accelerator.
            access: How shards behind a URL are reached, and where they are cached.
        """
        super().__init__()
        self.tokens = tokens
        self.train = [_below(root, source) for source in train or []]
        self.validation = {name: _below(root, source) for name, source in (validation or {}).items()}
        self.batching = batching or BatchingConfig()
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.seed = seed
        self.expand_history = expand_history
        self.max_skip_share = max_skip_share
        self.max_seconds = max_seconds
        self.mels_on_device = mels_on_device
        self.access = access or ShardAccess()
        self._log_mel = LogMel(mel_bins=tokens.mel_bins)
        self.resume_step = 0
        self.train_loader: DialogueLoader | None = None
        self.validation_loaders: dict[str, DialogueLoader] = {}

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets, in the order of Lightning's `dataloader_idx`."""
        return list(self.validation)

    def train_dataloader(self) -> DialogueLoader:
        """Endless batches of the mixture; this rank's."""
        check_sources(self.train)
        stream = TrainingStream(
            self._reading(), sources=self.train, augmentation=self.augmentation, resume_step=self.resume_step
        )
        self.train_loader = self._loader(stream)
        return self.train_loader

    def val_dataloader(self) -> list[DialogueLoader]:
        """One loader a validation set."""
        self.validation_loaders = {
            name: self._loader(ValidationStream(self._reading(), source=source, name=name))
            for name, source in self.validation.items()
        }
        return list(self.validation_loaders.values())

    def test_dataloader(self) -> list[DialogueLoader]:
        """The validation sets: `echat test` is a validation that nothing was chosen by."""
        return self._needed(self.val_dataloader())

    def predict_dataloader(self) -> list[DialogueLoader]:
        """The validation sets, to be answered."""
        return self._needed(self.val_dataloader())

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Make the log-mels of a batch that carries waveforms, on the device that it is on by now."""
        return make_log_mels(batch, self._log_mel.to(batch.input_ids.device))

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, so that going on does not repeat the order it began with."""
        return {"resume_step": self.trainer.global_step if self.trainer else self.resume_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before the loaders are made."""
        self.resume_step = int(state_dict["resume_step"])

    def _needed(self, loaders: list[DialogueLoader]) -> list[DialogueLoader]:
        if not loaders:
            raise UserError("data.validation names no set; give one to test or predict on")
        return loaders

    def _reading(self) -> ReadingConfig:
        return ReadingConfig(
            tokens=self.tokens,
            batching=self.batching,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            expand_history=self.expand_history,
            max_skip_share=self.max_skip_share,
            max_seconds=self.max_seconds,
            mels_on_device=self.mels_on_device,
            access=self.access,
        )

    def _loader(self, stream: TrainingStream | ValidationStream) -> DialogueLoader:
        return DialogueLoader.over(stream, num_workers=self.num_workers, pin_memory=torch.cuda.is_available())


def _below(root: str, source: SourceConfig) -> SourceConfig:
    """The source with its relative patterns below `root`; absolute ones and URLs stay."""
    return replace(source, shards=[below(root, pattern) for pattern in source.shards])
