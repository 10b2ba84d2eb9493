"""The LightningDataModule of every stage: a mixture of sources to train on, named sets to validate and test on."""

from __future__ import annotations

from dataclasses import replace

from datamodules.resumable import ResumableDataModule, pins
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.clip_features import make_log_mels
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import PredictionBatches, TrainingLoader, ValidationLoader
from lightning_echat.data.log_mel import LogMel
from lightning_echat.data.mixture import MixtureUnit, SourceConfig, asked_shares, check_sources
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import below
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.utterances import UtteranceConfig
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.tokens.dialogue_template import TokensConfig


class SpokenDialogueDataModule(ResumableDataModule):
    """Streams dialogues from shards.

    Training never ends by itself as long as a source is repeated: give `trainer.max_steps`, and
    `trainer.val_check_interval` in steps with `check_val_every_n_epoch: null`. Where none is, an epoch reads everything
    once, in as many steps on every rank.

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
        super().__init__(num_workers=num_workers)
        self.tokens = tokens
        self.train = [_below(root, source) for source in train or []]
        self.validation = {name: _below(root, source) for name, source in (validation or {}).items()}
        self.test = {name: _below(root, source) for name, source in (test or {}).items()} or self.validation
        self.mixture_by: MixtureUnit = mixture_by
        self.batching = batching or BatchingConfig()
        self.augmentation = augmentation
        self.seed = seed
        self.expand_history = expand_history
        self.max_skip_share = max_skip_share
        self.max_seconds = max_seconds
        self.mels_on_device = mels_on_device
        self.access = access or ShardAccess()
        self.utterances: UtteranceConfig | None = None
        self._log_mel = LogMel(mel_bins=tokens.mel_bins)
        self.validation_loaders: dict[str, ValidationLoader] = {}

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

    def train_dataloader(self) -> TrainingLoader:
        """Batches of the mixture, this rank's, from where a checkpoint or the loader before stands."""
        check_sources(self.train)
        stream = TrainingStream(
            self._reading(), sources=self.train, mixture_by=self.mixture_by, augmentation=self.augmentation
        )
        return self.resumed_loader(stream)

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
            self.validation_loaders[name] = ValidationLoader(stream, num_workers=self.num_workers, pin_memory=pins())
        return list(self.validation_loaders.values())

    def on_after_batch_transfer(self, batch: PackedBatch, dataloader_idx: int) -> PackedBatch:
        """Make the log-mels of a batch that carries waveforms, on the device that it is on by now."""
        return make_log_mels(batch, self._log_mel.to(batch.input_ids.device))

    def _needed(self, loaders: list[ValidationLoader]) -> list[ValidationLoader]:
        if not loaders:
            raise UserError("data.test and data.validation name no set; give one to test or predict on")
        return loaders

    def _reading(self) -> ReadingConfig:
        return ReadingConfig(
            tokens=self.tokens,
            batching=self.batching,
            seed=self.seed,
            **self.share(),
            expand_history=self.expand_history,
            max_skip_share=self.max_skip_share,
            max_seconds=self.max_seconds,
            mels_on_device=self.mels_on_device,
            access=self.access,
            utterances=self.utterances,
        )


def _below(root: str, source: SourceConfig) -> SourceConfig:
    """The source with its relative patterns below `root`; absolute ones and URLs stay."""
    return replace(source, shards=[below(root, pattern) for pattern in source.shards])
