"""Dialogues to rows, rows to batches: padded among their like in length, or packed first-fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_echat.contracts import IGNORE_INDEX, AudioClip, PackedBatch, TokenizedDialogue, UserError
from lightning_echat.tokens.paralinguistics import LABEL_SETS

Row = list[TokenizedDialogue]
Tag = TypeVar("Tag")

_FRAMES_WEIGHT = 0.25
"""How much a ratio of mel frames counts against the same ratio of ids when dialogues of like length are sought."""
_PACKED_SLACK = 0.01
"""Share of a row that packing leaves empty rather than fill it with a clip of quite another length."""

_FRAME_MULTIPLE = 32
"""Mel frames of a batch are padded to a multiple of it: convolution kernels that were prepared for a shape are used
again, which saves a CPU a tenth of the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How dialogues become batches. Every id counts: text, audio placeholders, speech codes, padding.

    Attributes:
        tokens_per_batch: Most ids in a batch, padding included.
        max_rows: Most rows in a batch.
        max_ids: Longest dialogue; longer ones are skipped and counted. When packing also the capacity of a row.
        pool: Dialogues looked at together, to find those of like length or to pack them.
        packed: Several dialogues in a row, which needs an attention that keeps them apart. Otherwise one a row.
        shuffle: Stored dialogues per source and worker held back, still encoded, to be drawn from at random.
        validation_rows: Rows of a validation batch, one dialogue each.
    """

    tokens_per_batch: int = 8192
    max_rows: int = 64
    max_ids: int = 2048
    pool: int = 1024
    packed: bool = False
    shuffle: int = 256
    validation_rows: int = 8

    def __post_init__(self) -> None:
        """Refuse sizes that no batch can have."""
        for name in ("tokens_per_batch", "max_rows", "max_ids", "pool", "shuffle", "validation_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"batching.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_ids > self.tokens_per_batch:
            raise UserError(
                f"batching.max_ids {self.max_ids} exceeds tokens_per_batch {self.tokens_per_batch}; "
                "a dialogue must fit into a batch: lower the one or raise the other"
            )


def collate(dialogues: Sequence[TokenizedDialogue], *, padding: int, mel_bins: int = 80) -> PackedBatch:
    """One dialogue a row, padded to the longest."""
    return pack_rows([[dialogue] for dialogue in dialogues], padding=padding, mel_bins=mel_bins)


def pack_rows(rows: Sequence[Row], *, padding: int, mel_bins: int = 80) -> PackedBatch:
    """The batch of the given rows, each one or several dialogues long.

    Without any dialogue the batch is one position of padding: a rank that has nothing left still takes its step.

    Args:
        rows: Dialogues of each row, in reading order.
        padding: The id that fills row ends (`Vocabulary.padding`).
        mel_bins: Width of `log_mels` when there is no clip.
    """
    width = max((sum(len(d.input_ids) for d in row) for row in rows), default=1)
    height = max(len(rows), 1)
    clips = [clip for row in rows for dialogue in row for clip in dialogue.clips]
    batch = PackedBatch(
        input_ids=torch.full((height, width), padding),
        labels=torch.full((height, width), IGNORE_INDEX),
        speech_scored=torch.zeros(height, width, dtype=torch.bool),
        position_ids=torch.zeros(height, width, dtype=torch.long),
        document_ids=torch.zeros(height, width, dtype=torch.long),
        references=[],
        waveforms=_pad_those_given([clip.waveform for clip in clips]),
        alterations=_pad_those_given([clip.alterations for clip in clips]),
        health={},
        **_clip_fields(rows, mel_bins),
    )
    for row_number, row in enumerate(rows):
        start = 0
        for document, dialogue in enumerate(row, start=1):
            length = len(dialogue.input_ids)
            span = (row_number, slice(start, start + length))
            batch.input_ids[span] = dialogue.input_ids
            batch.labels[span] = dialogue.labels
            batch.speech_scored[span] = dialogue.speech_scored
            batch.position_ids[span] = torch.arange(length)
            batch.document_ids[span] = document
            batch.references.append(replace(dialogue.reference, row=row_number, start=start, length=length))
            start += length
    return batch


def _clip_fields(rows: Sequence[Row], mel_bins: int) -> dict[str, Tensor]:
    """Everything of a batch that has one entry a clip."""
    clips: list[AudioClip] = []
    places: list[tuple[int, int, int]] = []
    for row_number, row in enumerate(rows):
        start = 0
        for dialogue in row:
            clips += dialogue.clips
            places += [(row_number, start + clip.start, clip.length) for clip in dialogue.clips]
            start += len(dialogue.input_ids)
    where = torch.tensor(places, dtype=torch.long).reshape(-1, 3)
    return {
        "log_mels": _round_up(_pad([clip.log_mel for clip in clips], torch.zeros(0, 0, mel_bins))),
        "log_mel_lengths": torch.tensor([len(clip.log_mel) for clip in clips], dtype=torch.long),
        "clip_rows": where[:, 0].contiguous(),
        "clip_starts": where[:, 1].contiguous(),
        "clip_lengths": where[:, 2].contiguous(),
        "clip_labels": _pad([clip.labels for clip in clips], torch.zeros(0, len(LABEL_SETS), dtype=torch.long)),
        "clip_characters": _pad([clip.characters for clip in clips], torch.zeros(0, 0, dtype=torch.long)),
        "clip_character_lengths": torch.tensor([len(clip.characters) for clip in clips], dtype=torch.long),
        "clip_transcript_ids": _pad([clip.transcript_ids for clip in clips], torch.zeros(0, 0, dtype=torch.long)),
        "clip_transcript_lengths": torch.tensor([len(clip.transcript_ids) for clip in clips], dtype=torch.long),
    }


def _pad_those_given(tensors: list[Tensor | None]) -> Tensor | None:
    """Padded like the others, zeros where a clip has none; None where no clip has any."""
    some = next((tensor for tensor in tensors if tensor is not None), None)
    if some is None:
        return None
    return pad_sequence([some[:0] if tensor is None else tensor for tensor in tensors], batch_first=True)


def _round_up(log_mels: Tensor) -> Tensor:
    """[C, F, M] -> [C, F', M], F' the next multiple of `_FRAME_MULTIPLE`."""
    return F.pad(log_mels, (0, 0, 0, -log_mels.shape[1] % _FRAME_MULTIPLE))


def _pad(tensors: list[Tensor], nothing: Tensor) -> Tensor:
    return pad_sequence(tensors, batch_first=True) if tensors else nothing


class Window(Generic[Tag]):
    """Dialogues looked at together, oldest first, from which each batch takes those that go well together.

    It is topped up after every batch, so reading is spread evenly over batches. The oldest dialogue is in every batch:
    none waits longer than `pool` batches, and what fits badly gathers here until it fits with its like.

    Attributes:
        entries: Each dialogue with what the caller wants to know it by.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.entries: list[tuple[TokenizedDialogue, Tag]] = []
        self._config = config
        self._ids = 0

    @property
    def full(self) -> bool:
        """Whether there is enough to choose from: `pool` dialogues, and ids for two batches."""
        return len(self.entries) >= self._config.pool and self._ids >= 2 * self._config.tokens_per_batch

    def add(self, dialogue: TokenizedDialogue, tag: Tag) -> None:
        """A dialogue of at most `max_ids` ids."""
        self.entries.append((dialogue, tag))
        self._ids += len(dialogue.input_ids)

    def take(self) -> list[Row]:
        """Remove the rows of one batch; none when nothing is left."""
        if not self.entries:
            return []
        ids = np.array([len(dialogue.input_ids) for dialogue, _ in self.entries])
        frames = np.array([_num_frames(dialogue) for dialogue, _ in self.entries])
        if self._config.packed:
            chosen = choose_packed(ids, frames, self._config)
        else:
            chosen = [[place] for place in choose_padded(ids, frames, self._config)]
        rows = [[self.entries[place][0] for place in row] for row in chosen]
        gone = {place for row in chosen for place in row}
        self.entries = [entry for place, entry in enumerate(self.entries) if place not in gone]
        self._ids -= sum(len(dialogue.input_ids) for row in rows for dialogue in row)
        return rows


def _num_frames(dialogue: TokenizedDialogue) -> int:
    return max((len(clip.log_mel) for clip in dialogue.clips), default=0)


def choose_padded(ids: np.ndarray, frames: np.ndarray, config: BatchingConfig) -> list[int]:
    """Places of the dialogues of one padded batch: the first, and those that are most like it in length.

    Args:
        ids: [N] lengths of the dialogues.
        frames: [N] mel frames of each one's longest clip, 0 without one.
        config: Sizes.
    """
    by_ids = np.abs(np.log(ids / ids[0]))
    # The two lengths hardly go together: a long query may ask for a label alone. Padded ids cost more than frames do.
    distance = np.maximum(by_ids, _FRAMES_WEIGHT * _frame_distance(frames, nearness=by_ids))
    order = np.argsort(distance, kind="stable")
    rows = np.arange(1, len(order) + 1)
    fits = (rows * np.maximum.accumulate(ids[order]) <= config.tokens_per_batch) & (rows <= config.max_rows)
    return order[: len(order) if fits.all() else int(fits.argmin())].tolist()


def choose_packed(ids: np.ndarray, frames: np.ndarray, config: BatchingConfig) -> list[list[int]]:
    """Places of the dialogues of one packed batch, row by row: first-fit into rows of `max_ids`.

    Rows have room for dialogues of any length, so after the first come those whose clips are about as long as its own:
    clips are what the encoder pads.

    Args:
        ids: [N] lengths of the dialogues.
        frames: [N] mel frames of each one's longest clip, 0 without one.
        config: Sizes.
    """
    num_rows = min(config.tokens_per_batch // config.max_ids, config.max_rows)
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room = [config.max_ids] * num_rows
    enough = int(_PACKED_SLACK * config.max_ids)
    lengths = ids.tolist()
    for place in np.argsort(_frame_distance(frames, nearness=np.arange(len(ids))), kind="stable").tolist():
        number = next((n for n, free in enumerate(room) if lengths[place] <= free), None)
        if number is not None:
            rows[number].append(place)
            room[number] -= lengths[place]
            if max(room) <= enough:
                break
    return [row for row in rows if row]


def _frame_distance(frames: np.ndarray, *, nearness: np.ndarray) -> np.ndarray:
    """[N] log ratio of each one's frames to the first one's; 0 without a clip, which has no frames to pad.

    Where the first has no clip, that of the nearest with one is the measure.
    """
    heard = frames > 0
    if not heard.any():
        return np.zeros(len(frames))
    measure = frames[0] or frames[np.where(heard, nearness, np.inf).argmin()]
    return np.abs(np.log(np.where(heard, frames, measure) / measure))


def padding_share(batch: PackedBatch) -> float:
    """Share of the batch's ids that are padding."""
    return 1.0 - batch.num_tokens / batch.document_ids.numel()


def frame_padding_share(batch: PackedBatch) -> float:
    """Share of the batch's mel frames that are padding, 0 without clips."""
    frames = batch.log_mels.shape[0] * batch.log_mels.shape[1]
    return 1.0 - int(batch.log_mel_lengths.sum()) / frames if frames else 0.0
