"""The LightningDataModule of token-to-speech: replies and their codes, from the shards of the other stages."""

from __future__ import annotations

import logging

from datamodules.resumable import ResumableDataModule, pins
from lightning_echat.contracts import UserError
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.mixture import SourceConfig
from lightning_echat.data.remote import ShardAccess
from lightning_echat.data.shards import below
from lightning_echat.data.voice_stream import VoiceLoader, VoiceReadingConfig, VoiceStream
from lightning_echat.data.voice_training import VoiceTrainingStream

_LOG = logging.getLogger(__name__)


class VoiceDataModule(ResumableDataModule):
    """Streams the assistant's utterances. Training never ends by itself: give `trainer.max_steps`.

    Attributes:
        codebook_size: Set by a stage that knows only so many codes; a larger one ends the run.
        speaker_size: Set by a stage that takes speaker embeddings of that size; one of another size ends the run.
    """

    def __init__(
        self,
        sample_rate: int,
        root: str = "",
        train: list[str] | None = None,
        validation: dict[str, list[str]] | None = None,
        code_rate: float = 25.0,
        rows: int = 16,
        segment_codes: int | None = None,
        max_seconds: float = 20.0,
        shuffle: int = 256,
        num_workers: int = 1,
        seed: int = 0,
        max_skip_share: float = 0.05,
        access: ShardAccess | None = None,
    ) -> None:
        """Take the settings; shards are looked up when the loaders are made.

        Args:
            sample_rate: Hz of the waveforms; that of the mel. Audio of another rate is resampled.
            root: Folder or URL that relative patterns of shards start from.
            train: Patterns of shards.
            validation: Name of a set -> patterns of its shards; every utterance is seen exactly once.
            code_rate: Codes a second.
            rows: Utterances of a batch.
            segment_codes: Length of the stretch cut out of each training utterance; null takes it whole.
            max_seconds: Longer utterances are skipped and counted.
            shuffle: Utterances that training batches are drawn from.
            num_workers: Reading processes per rank and loader; 0 reads in the trainer's own process.
            seed: Decides every draw.
            max_skip_share: Share of unusable utterances past which the run stops.
            access: How shards behind a URL are reached, and where they are cached.
        """
        super().__init__(num_workers=num_workers)
        self.sample_rate, self.code_rate = sample_rate, code_rate
        shards = [below(root, pattern) for pattern in train or []]
        self.train = [SourceConfig(name="voice", shards=shards, tasks=[])] if shards else []
        self.validation = {
            name: [below(root, pattern) for pattern in patterns] for name, patterns in (validation or {}).items()
        }
        self.rows, self.segment_codes, self.max_seconds, self.shuffle = rows, segment_codes, max_seconds, shuffle
        self.seed, self.max_skip_share = seed, max_skip_share
        self.access = access or ShardAccess()
        self.codebook_size: int | None = None
        self.speaker_size = 0

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets, in the order of Lightning's `dataloader_idx`."""
        return list(self.validation)

    def train_dataloader(self) -> TrainingLoader:
        """This rank's share of the training utterances, from where a checkpoint or the loader before stands."""
        if not self.train:
            raise UserError("data.train names no shards")
        return self.resumed_loader(VoiceTrainingStream(self._reading(), source=self.train[0]))

    def val_dataloader(self) -> list[VoiceLoader]:
        """One loader a validation set."""
        streams = [VoiceStream(self._reading(), shards=shards) for shards in self.validation.values()]
        return [VoiceLoader(stream, num_workers=self.num_workers, pin_memory=pins()) for stream in streams]

    def teardown(self, stage: str) -> None:
        """Say what could not be used."""
        if self.train_loader is not None and (self.train_loader.health.skipped or self.train_loader.health.noticed):
            _LOG.warning("training utterances: %s", self.train_loader.health.summary())

    def _reading(self) -> VoiceReadingConfig:
        return VoiceReadingConfig(
            sample_rate=self.sample_rate,
            code_rate=self.code_rate,
            codebook_size=self.codebook_size,
            speaker_size=self.speaker_size,
            rows=self.rows,
            segment_codes=self.segment_codes,
            max_seconds=self.max_seconds,
            shuffle=self.shuffle,
            max_skip_share=self.max_skip_share,
            seed=self.seed,
            **self.share(),
            access=self.access,
        )
