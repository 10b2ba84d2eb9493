"""What the figures of validation and test sets are called."""

from __future__ import annotations

from lightning.pytorch import Trainer


def set_keys(trainer: Trainer) -> list[str]:
    """`val/<set>`, or `test/<set>` in `echat test`, in the order of Lightning's `dataloader_idx`.

    Empty where the datamodule names no sets. The same on every rank.
    """
    kind, attribute = ("test", "test_names") if trainer.testing else ("val", "validation_names")
    names = getattr(getattr(trainer, "datamodule", None), attribute, None) or []
    return [f"{kind}/{name}" for name in names]
