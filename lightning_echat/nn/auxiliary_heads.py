"""Heads on the speech encoder that only training uses: CTC over characters, and labels from pooled frames.

A model trained from nothing learns to listen much sooner with them (docs/log.md has the figures); pretrained
encoders do without.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_echat.contracts import UserError
from lightning_echat.nn.speech_encoder import length_mask
from lightning_echat.tokens.characters import CTC_CLASSES
from lightning_echat.tokens.paralinguistics import LABEL_SETS


class AuxiliaryHeads(nn.Module):
    """Character logits for each frame, and class logits for each clip and label set."""

    def __init__(self, encoder_width: int, *, label_sets: Sequence[str]) -> None:
        super().__init__()
        if unknown := [name for name in label_sets if name not in LABEL_SETS]:
            raise UserError(f"auxiliary_labels: no label set {unknown[0]!r}; known: {', '.join(LABEL_SETS)}")
        self.characters = nn.Linear(encoder_width, CTC_CLASSES)
        self.labels = nn.ModuleDict({name: nn.Linear(2 * encoder_width, len(LABEL_SETS[name])) for name in label_sets})

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[C, F, E] frames -> [C, F, characters] logits, and label set -> [C, classes] logits.

        Clips are pooled by mean and standard deviation over their valid frames.
        """
        mask = length_mask(lengths, frames.shape[1])[..., None].to(frames.dtype)
        count = mask.sum(1).clamp_min(1)
        mean = (frames * mask).sum(1) / count
        variance = ((frames - mean[:, None]).square() * mask).sum(1) / count
        pooled = torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)
        return self.characters(frames), {name: head(pooled) for name, head in self.labels.items()}
