"""What LightningDataModules share that train on without losing or repeating a batch when a run is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule

from lightning_echat.contracts import UserError
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.ranks import Ranks
from lightning_echat.data.resumable_stream import ResumableStream
from lightning_echat.data.stream_state import Position, from_checkpoint, redistribute, to_checkpoint


class ResumableDataModule(LightningDataModule):
    """Keeps where the training data stands.

    Checkpoints hold where it stands after the last optimizer step, for all ranks; going on from one yields the batches
    that would have followed (docs/data_engine.md). It is kept here and not by the loader, whose state Lightning takes a
    batch too late, of rank 0 only, and not at all at the end of an epoch.

    Args:
        num_workers: Reading processes per rank and loader.
    """

    def __init__(self, *, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers
        self.train_loader: TrainingLoader | None = None
        self._ranks = Ranks()
        self._restored: dict[str, Any] | None = None
        self._trained = _TrainedPositions()

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

    def resumed_loader(self, stream: ResumableStream) -> TrainingLoader:
        """Batches of a stream, this rank's, from where a checkpoint or the loader before stands."""
        self._ranks = Ranks()
        position = self._trained.at(self._steps) or self._restored_position(stream)
        self.train_loader = TrainingLoader(
            stream, num_workers=self.num_workers, ranks=self._ranks, position=position, pin_memory=pins()
        )
        self._trained = _TrainedPositions(before=self.train_loader.position, steps=self._steps)
        return self.train_loader

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Remember where the data stands after a training batch; the batch needs it no more."""
        if batch.position is not None:
            before = self._trained.at(self._steps)
            self._trained = _TrainedPositions(before=before, after=batch.position, steps=self._steps)
            batch.position = None
        return batch

    def share(self) -> dict[str, int]:
        """Which of how many shares of the data this rank reads; ranks of a tensor-parallel group read the same."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {"rank": share["rank"], "world_size": share["num_replicas"]} if share else {"rank": 0, "world_size": 1}

    def state_dict(self) -> dict[str, Any]:
        """Where the training data stands on all ranks; every rank calls this."""
        position = self._trained.at(self._steps)
        if self.train_loader is None or position is None:
            return {"train": self._restored}
        made_by = self.train_loader.stream.made_by(workers=len(position.workers))
        positions = self._ranks.gather(position)
        # Ranks of a tensor-parallel group are next to each other and stand at the same place.
        return {"train": to_checkpoint(positions[:: len(positions) // self.share()["world_size"]], made_by)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called before the loaders are made."""
        if "train" not in state_dict:
            raise UserError("the checkpoint's data was read by an older version; begin a new run with init_from")
        self._restored = state_dict["train"]

    @property
    def _steps(self) -> int:
        """Optimizer steps that are over."""
        return self.trainer.global_step if self.trainer else 0

    def _restored_position(self, stream: ResumableStream) -> Position | None:
        if self._restored is None:
            return None
        workers = max(self.num_workers, 1)
        positions = from_checkpoint(self._restored, stream.made_by(workers=workers))
        config = stream.config
        if len(positions) != config.world_size:
            orders = stream.orders(positions[0].deals, consumers=len(positions) * workers)
            positions = redistribute(positions, orders, world_size=config.world_size)
        return positions[config.rank]


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


def pins() -> bool:
    """Whether batches go to an accelerator."""
    return torch.cuda.is_available()
