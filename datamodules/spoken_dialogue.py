"""The LightningDataModule of every stage: a mixture of sources to train on, named sets to validate and test on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningDataModule

from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.clip_features import make_log_mels
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import PredictionBatches, TrainingLoader, ValidationLoader
from lightning_echat.data.log_mel import LogMel
from lightning_echat.data.mixture import MixtureUnit, SourceConfig, asked_shares, check_sources
from lightning_echat.data.ranks import Ranks
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import below
from lightning_echat.data.stream_state import Position, from_checkpoint, redistribute, to_checkpoint
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.utterances import UtteranceConfig
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.tokens.dialogue_template import TokensConfig


class SpokenDialogueDataModule(LightningDataModule):
    """Streams dialogues from shards.

    Training never ends by itself as long as a source is repeated: give `trainer.max_steps`, and
    `trainer.val_check_interval` in steps with `check_val_every_n_epoch: null`. Where none is, an epoch reads everything
    once, in as many steps on every rank.

    Checkpoints hold where the data stands after the last optimizer step, for all ranks; going on from one yields the
    batches that would have followed (docs/data_engine.md). It is kept here and not by the loader, whose state Lightning
    takes a batch too late, of rank 0 only, and not at all at the end of an epoch.

    Attributes:
        utterances: Set by a stage that learns from the sound of replies: batches then carry it.
    """

    def __init__(
        self,
        tokens: TokensConfig,
        root: str = "",
        train: list[SourceConfig] | None = None,
        validation: dict[str, SourceConfig] | None = None,
        test: dict[str, SourceConfig] | None = None,
        mixture_by: MixtureUnit = "samples",
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
            test: The same for `echat test` and `echat predict`; null for the validation sets.
            mixture_by: What the weights of sources and tasks share out: samples, or tokens, audio included.
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
        self.test = {name: _below(root, source) for name, source in (test or {}).items()} or self.validation
        self.mixture_by: MixtureUnit = mixture_by
        self.batching = batching or BatchingConfig()
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.seed = seed
        self.expand_history = expand_history
        self.max_skip_share = max_skip_share
        self.max_seconds = max_seconds
        self.mels_on_device = mels_on_device
        self.access = access or ShardAccess()
        self.utterances: UtteranceConfig | None = None
        self._log_mel = LogMel(mel_bins=tokens.mel_bins)
        self.train_loader: TrainingLoader | None = None
        self.validation_loaders: dict[str, ValidationLoader] = {}
        self._ranks = Ranks()
        self._restored: dict[str, Any] | None = None
        self._trained = _TrainedPositions()

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets, in the order of Lightning's `dataloader_idx`."""
        return list(self.validation)

    @property
    def test_names(self) -> list[str]:
        """Names of the sets of `echat test` and `echat predict`, in the order of `dataloader_idx`."""
        return list(self.test)

    @property
    def asked_shares(self) -> dict[str, float]:
        """Share of the mixture asked for by "<source>/<task>"."""
        return asked_shares(self.train)

    @property
    def epochs(self) -> dict[str, float]:
        """How often this rank has been through each source."""
        position = self._trained.at(self._steps)
        if self.train_loader is None or position is None:
            return {}
        return self.train_loader.stream.epochs(position)

    def setup(self, stage: str) -> None:
        """Forget an earlier training; Lightning calls this before it restores a checkpoint."""
        if stage == "fit":
            self._restored = None
            self._trained = _TrainedPositions()

    def train_dataloader(self) -> TrainingLoader:
        """Batches of the mixture, this rank's, from where a checkpoint or the loader before stands."""
        check_sources(self.train)
        stream = TrainingStream(
            self._reading(), sources=self.train, mixture_by=self.mixture_by, augmentation=self.augmentation
        )
        self._ranks = Ranks()
        position = self._trained.at(self._steps) or self._restored_position(stream)
        self.train_loader = TrainingLoader(
            stream, num_workers=self.num_workers, ranks=self._ranks, position=position, pin_memory=_pins()
        )
        self._trained = _TrainedPositions(before=self.train_loader.position, steps=self._steps)
        return self.train_loader

    def val_dataloader(self) -> list[ValidationLoader]:
        """One loader a validation set."""
        return self._set_loaders(self.validation)

    def test_dataloader(self) -> list[ValidationLoader]:
        """One loader a test set: `echat test` is a validation that nothing was chosen by."""
        return self._needed(self._set_loaders(self.test))

    def predict_dataloader(self) -> list[PredictionBatches]:
        """The test sets, to be answered."""
        return [PredictionBatches(loader) for loader in self.test_dataloader()]

    def _set_loaders(self, sets: dict[str, SourceConfig]) -> list[ValidationLoader]:
        self.validation_loaders = {}
        for name, source in sets.items():
            stream = ValidationStream(self._reading(), source=source, name=name)
            self.validation_loaders[name] = ValidationLoader(stream, num_workers=self.num_workers, pin_memory=_pins())
        return list(self.validation_loaders.values())

    def on_before_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Remember where the data stands after a training batch; the batch needs it no more."""
        if batch.position is not None:
            before = self._trained.at(self._steps)
            self._trained = _TrainedPositions(before=before, after=batch.position, steps=self._steps)
            batch.position = None
        return batch

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Make the log-mels of a batch that carries waveforms, on the device that it is on by now."""
        return make_log_mels(batch, self._log_mel.to(batch.input_ids.device))

    def state_dict(self) -> dict[str, Any]:
        """Where the training data stands on all ranks; every rank calls this."""
        position = self._trained.at(self._steps)
        if self.train_loader is None or position is None:
            return {"train": self._restored}
        made_by = self.train_loader.stream.made_by(workers=len(position.workers))
        positions = self._ranks.gather(position)
        # Ranks of a tensor-parallel group are next to each other and stand at the same place.
        return {"train": to_checkpoint(positions[:: len(positions) // self._reading().world_size], made_by)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before the loaders are made."""
        if "train" not in state_dict:
            raise UserError("the checkpoint's data was read by an older version; begin a new run with init_from")
        self._restored = state_dict["train"]

    @property
    def _steps(self) -> int:
        """Optimizer steps that are over."""
        return self.trainer.global_step if self.trainer else 0

    def _restored_position(self, stream: TrainingStream) -> Position | None:
        if self._restored is None:
            return None
        workers = max(self.num_workers, 1)
        positions = from_checkpoint(self._restored, stream.made_by(workers=workers))
        config = stream.config
        if len(positions) != config.world_size:
            orders = stream.orders(positions[0].deals, consumers=len(positions) * workers)
            positions = redistribute(positions, orders, world_size=config.world_size)
        return positions[config.rank]

    def _needed(self, loaders: list[ValidationLoader]) -> list[ValidationLoader]:
        if not loaders:
            raise UserError("data.test and data.validation name no set; give one to test or predict on")
        return loaders

    def _share(self) -> dict[str, int]:
        """Which of how many shares of the data this rank reads; ranks of a tensor-parallel group read the same."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {"rank": share["rank"], "world_size": share["num_replicas"]} if share else {"rank": 0, "world_size": 1}

    def _reading(self) -> ReadingConfig:
        return ReadingConfig(
            tokens=self.tokens,
            batching=self.batching,
            seed=self.seed,
            **self._share(),
            expand_history=self.expand_history,
            max_skip_share=self.max_skip_share,
            max_seconds=self.max_seconds,
            mels_on_device=self.mels_on_device,
            access=self.access,
            utterances=self.utterances,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TrainedPositions:
    """Where the data stands after the last optimizer step.

    Not what has been fetched ahead counts, nor an accumulation window that was broken off: its gradients are gone, so
    all of its batches come again.

    Attributes:
        before: After the last step that was over when a batch was given to the model last.
        after: After that batch.
        steps: How many steps were over then.
    """

    before: Position | None = None
    after: Position | None = None
    steps: int = 0

    def at(self, steps: int) -> Position | None:
        """The position when so many steps are over."""
        return self.after if steps > self.steps else self.before


def _pins() -> bool:
    return torch.cuda.is_available()


def _below(root: str, source: SourceConfig) -> SourceConfig:
    """The source with its relative patterns below `root`; absolute ones and URLs stay."""
    return replace(source, shards=[below(root, pattern) for pattern in source.shards])
