"""Lightning's ModelCheckpoint, which also keeps the very end of training."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class StageCheckpoint(ModelCheckpoint):
    """Saves as ModelCheckpoint does, and once more when training ends between two savings.

    ModelCheckpoint leaves the steps after the last multiple of `every_n_train_steps` unsaved, and the next stage would
    begin without them. Arguments are ModelCheckpoint's.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless the last step is saved already."""
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        super().on_train_end(trainer, pl_module)
