"""Dialogues to rows, rows to batches: padded by length buckets, or packed first-fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_echat.contracts import IGNORE_INDEX, AudioClip, PackedBatch, TokenizedDialogue, UserError
from lightning_echat.tokens.paralinguistics import LABEL_SETS

Row = list[TokenizedDialogue]

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
        pool: Dialogues looked at together, to sort them by length or to pack them.
        packed: Several dialogues in a row, which needs an attention that keeps them apart. Otherwise one a row.
        shuffle: Stored dialogues per source and worker held back, still encoded, to be drawn from at random.
        validation_rows: Rows of a validation batch, one dialogue each.
    """

    tokens_per_batch: int = 8192
    max_rows: int = 64
    max_ids: int = 2048
    pool: int = 512
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


def batch_rows(
    dialogues: Iterable[TokenizedDialogue], *, config: BatchingConfig, random: Random
) -> Iterator[list[Row]]:
    """Cut a stream of dialogues into the rows of batches. Nothing is dropped; only the very last may be small."""
    plan = _packed_batches if config.packed else _padded_batches
    stream = iter(dialogues)
    held: list[Row] = []
    while pool := list(islice(stream, config.pool)):
        batches, held = plan([dialogue for row in held for dialogue in row] + pool, config, random)
        random.shuffle(batches)
        yield from batches
    if held:
        yield held


def _padded_batches(pool: Row, config: BatchingConfig, random: Random) -> tuple[list[list[Row]], list[Row]]:
    """Sort by length and cut by the budget. The last cut, seldom full, goes back to the pool."""
    batches: list[list[Row]] = []
    current: list[Row] = []
    longest = 0
    for dialogue in _by_length(pool, config, random):
        length = len(dialogue.input_ids)
        rows = len(current) + 1
        if current and (rows > config.max_rows or rows * max(longest, length) > config.tokens_per_batch):
            batches.append(current)
            current, longest = [], 0
        current.append([dialogue])
        longest = max(longest, length)
    return batches, current


def _by_length(pool: Row, config: BatchingConfig, random: Random) -> Row:
    """The pool in an order whose neighbours are alike both in mel frames and in ids.

    The encoder pays for padded frames, the language model for padded ids, and the two lengths hardly go together: a
    long query may ask for a label alone. So the pool is first parted by frames into strata, then each is sorted by
    ids, up and down in turn so that its borders fit. With the square root of the number of batches as the number of
    strata both paddings come out about equal.
    """
    num_ids = sum(len(dialogue.input_ids) for dialogue in pool)
    strata = max(1, round((num_ids / config.tokens_per_batch) ** 0.5))
    # Which end comes last is drawn: that end goes back to the pool, and must not be the longest every time.
    by_frames = sorted(pool, key=_num_frames)
    ordered: Row = []
    for i in range(strata):
        stratum = by_frames[i * len(pool) // strata : (i + 1) * len(pool) // strata]
        ordered += sorted(stratum, key=lambda dialogue: len(dialogue.input_ids), reverse=i % 2 == 1)
    return ordered if random.random() < 0.5 else ordered[::-1]


def _num_frames(dialogue: TokenizedDialogue) -> int:
    return max((len(clip.log_mel) for clip in dialogue.clips), default=0)


def _packed_batches(pool: Row, config: BatchingConfig, _random: Random) -> tuple[list[list[Row]], list[Row]]:
    """Pack rows of `max_ids` first-fit, longest first. Rows that make no whole batch, the emptiest, go back."""
    rows = _first_fit(pool, config.max_ids)
    rows_per_batch = min(config.tokens_per_batch // config.max_ids, config.max_rows)
    rows.sort(key=lambda row: -sum(len(dialogue.input_ids) for dialogue in row))
    whole = len(rows) // rows_per_batch * rows_per_batch
    batches = [rows[i : i + rows_per_batch] for i in range(0, whole, rows_per_batch)]
    return batches, rows[whole:]


def _first_fit(dialogues: Row, capacity: int) -> list[Row]:
    """Each dialogue into the first row that has room for it. A pool is small, so no search tree is needed."""
    rows: list[Row] = []
    room: list[int] = []
    for dialogue in sorted(dialogues, key=lambda d: -len(d.input_ids)):
        length = len(dialogue.input_ids)
        place = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(dialogue)
        room[place] -= length
    return rows


def padding_share(batch: PackedBatch) -> float:
    """Share of the batch's ids that are padding."""
    return 1.0 - batch.num_tokens / batch.document_ids.numel()


def frame_padding_share(batch: PackedBatch) -> float:
    """Share of the batch's mel frames that are padding, 0 without clips."""
    frames = batch.log_mels.shape[0] * batch.log_mels.shape[1]
    return 1.0 - int(batch.log_mel_lengths.sum()) / frames if frames else 0.0
