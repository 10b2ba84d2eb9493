"""Dialogues to rows, rows to batches: padded among their like in length, or packed first-fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_echat.contracts import (
    IGNORE_INDEX,
    AudioClip,
    DialogueReference,
    PackedBatch,
    TokenizedDialogue,
    UserError,
)
from lightning_echat.data.batch_memory import allocate
from lightning_echat.data.decoding import PCM_SCALE
from lightning_echat.data.log_mel import WINDOW, write_extended
from lightning_echat.data.utterances import collate_utterances
from lightning_echat.tokens.paralinguistics import LABEL_SETS

Row = list[TokenizedDialogue]
Tag = TypeVar("Tag")

_PACKED_SLACK = 0.06
"""Share of a row that packing leaves empty rather than fill it with a clip of quite another length, which would have
the encoder pad all the others."""
_LONGER_WEIGHT = 100.0
_SILENT_DISTANCE = 0.06
"""Of a dialogue without a clip when packing, as a log ratio of frames: such ones fill batches of rare lengths."""

_GROWTH = np.concatenate([[1.0], 1 + 0.02 * 1.6 ** np.arange(9)])
"""Sizes that a padded batch may have, as multiples of its first dialogue's: to 1.86."""

FRAME_MULTIPLE = 16
"""Mel frames of a batch are padded to a multiple of it: convolution kernels that were prepared for a shape are used
again, which saves a CPU a tenth of the step."""

_COUNTED = ("position_ids", "document_ids")
_CLIP_SEQUENCES = {"clip_characters": "characters", "clip_transcript_ids": "transcript_ids"}
_LENGTHS = {"clip_characters": "clip_character_lengths", "clip_transcript_ids": "clip_transcript_lengths"}
_CLIP_NUMBERS = ("log_mel_lengths", "clip_rows", "clip_starts", "clip_lengths", *_LENGTHS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How dialogues become batches. Every id counts: text, audio placeholders, speech codes, padding.

    Attributes:
        tokens_per_batch: Most ids in a batch, padding included.
        max_rows: Most rows in a batch.
        max_ids: Longest dialogue; longer ones are skipped and counted. When packing also the capacity of a row.
        pool: Dialogues looked at together, to find those of like length or to pack them.
        frames_weight: How much a padded mel frame counts against a padded id when a padded batch is chosen. Less
            pads more frames and mixes a batch more: a small model that begins from nothing may learn better from that.
        packed: Several dialogues in a row, which needs an attention that keeps them apart. Otherwise one a row.
        shuffle: Stored dialogues per source and worker held back, still encoded, to be drawn from at random.
        validation_rows: Rows of a validation batch, one dialogue each.
    """

    tokens_per_batch: int = 8192
    max_rows: int = 64
    max_ids: int = 2048
    pool: int = 2048
    frames_weight: float = 0.85
    packed: bool = False
    shuffle: int = 256
    validation_rows: int = 8

    def __post_init__(self) -> None:
        """Refuse sizes that no batch can have."""
        for name in ("tokens_per_batch", "max_rows", "max_ids", "pool", "shuffle", "validation_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"batching.{name} is {getattr(self, name)}; it must be at least 1")
        if self.frames_weight < 0:
            raise UserError(f"batching.frames_weight is {self.frames_weight}; it must be at least 0")
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
    width = max((sum(d.input_ids.shape[0] for d in row) for row in rows), default=1)
    clips = [clip for row in rows for dialogue in row for clip in dialogue.clips]
    tensors = allocate(_row_shapes(max(len(rows), 1), width) | _clip_shapes(clips, mel_bins))
    # NumPy assigns to a slice in a tenth of the time that torch takes.
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    arrays["input_ids"].fill(padding)
    arrays["labels"].fill(IGNORE_INDEX)
    references = _fill_rows(arrays, rows)
    _fill_clips(arrays, clips)
    utterances = [d.utterance for row in rows for d in row if d.utterance is not None]
    replies = collate_utterances(utterances) if utterances else None
    return PackedBatch(references=references, replies=replies, **tensors)  # pyright: ignore[reportArgumentType]


Arrays = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _row_shapes(height: int, width: int) -> Shapes:
    shapes: Shapes = {name: ((height, width), torch.int64) for name in ("input_ids", "labels", *_COUNTED)}
    return shapes | {"speech_scored": ((height, width), torch.bool)}


def _clip_shapes(clips: Sequence[AudioClip], mel_bins: int) -> Shapes:
    """Of everything that has one entry a clip."""
    count = len(clips)
    frames = max((clip.log_mel.shape[0] for clip in clips), default=0)
    bins = clips[0].log_mel.shape[1] if clips else mel_bins
    shapes: Shapes = {name: ((count,), torch.int64) for name in _CLIP_NUMBERS}
    shapes["log_mels"] = ((count, -(-frames // FRAME_MULTIPLE) * FRAME_MULTIPLE, bins), torch.float32)
    shapes["clip_labels"] = ((count, len(LABEL_SETS)), torch.int64)
    for name, attribute in _CLIP_SEQUENCES.items():
        shapes[name] = ((count, max((getattr(clip, attribute).shape[0] for clip in clips), default=0)), torch.int64)
    waveforms = [clip.waveform for clip in clips if clip.waveform is not None]
    if waveforms:
        dtype = torch.int16 if all(one.dtype == torch.int16 for one in waveforms) else torch.int32
        shapes["waveforms"] = ((count, max(one.shape[0] for one in waveforms) + WINDOW), dtype)
    if altered := [clip.alterations for clip in clips if clip.alterations is not None]:
        shapes["alterations"] = ((count, max(one.shape[0] for one in altered), altered[0].shape[1]), torch.int64)
    return shapes


def _fill_rows(arrays: Arrays, rows: Sequence[Row]) -> list[DialogueReference]:
    """Write what has one entry an id, and where clips stand; returns the references with their places."""
    references: list[DialogueReference] = []
    positions = np.arange(arrays["input_ids"].shape[1])
    clip_number = 0
    for row_number, row in enumerate(rows):
        start = 0
        for document, dialogue in enumerate(row, start=1):
            length = dialogue.input_ids.shape[0]
            end = start + length
            arrays["input_ids"][row_number, start:end] = dialogue.input_ids.numpy()
            arrays["labels"][row_number, start:end] = dialogue.labels.numpy()
            arrays["speech_scored"][row_number, start:end] = dialogue.speech_scored
            arrays["position_ids"][row_number, start:end] = positions[:length]
            arrays["document_ids"][row_number, start:end] = document
            references.append(replace(dialogue.reference, row=row_number, start=start, length=length))
            for clip in dialogue.clips:
                arrays["clip_rows"][clip_number] = row_number
                arrays["clip_starts"][clip_number] = start + clip.start
                arrays["clip_lengths"][clip_number] = clip.length
                clip_number += 1
            start = end
    return references


def _fill_clips(arrays: Arrays, clips: Sequence[AudioClip]) -> None:
    for number, clip in enumerate(clips):
        frames = clip.log_mel.shape[0]
        arrays["log_mels"][number, :frames] = clip.log_mel.numpy()
        arrays["log_mel_lengths"][number] = frames
        arrays["clip_labels"][number] = clip.labels.numpy()
        for name, attribute in _CLIP_SEQUENCES.items():
            values: Tensor = getattr(clip, attribute)
            arrays[name][number, : values.shape[0]] = values.numpy()
            arrays[_LENGTHS[name]][number] = values.shape[0]
        if clip.waveform is not None:
            samples = clip.waveform.numpy()
            if samples.dtype != arrays["waveforms"].dtype:  # 16-bit audio beside some that is not
                samples = (samples * np.float32(PCM_SCALE)).view(np.int32)
            write_extended(arrays["waveforms"][number], samples)
        if clip.alterations is not None:
            arrays["alterations"][number, : clip.alterations.shape[0]] = clip.alterations.numpy()


class Entry(NamedTuple, Generic[Tag]):
    """A dialogue in a window, and what its caller knows it by."""

    dialogue: TokenizedDialogue
    tag: Tag


class Window(Generic[Tag]):
    """Dialogues looked at together, oldest first, from which each batch takes those that go well together.

    It is topped up after every batch, so reading is spread evenly over batches. The oldest dialogue is in every batch:
    none waits longer than `pool` batches, and what fits badly gathers here until it fits with its like.

    Attributes:
        entries: What is in it.
    """

    def __init__(self, config: BatchingConfig) -> None:
        self.entries: list[Entry[Tag]] = []
        self._config = config
        self._ids = 0
        # Of all entries but the newest, and of those: ids, and frames of the longest clip.
        self._lengths = np.empty((0, 2), dtype=np.int64)
        self._new_lengths: list[tuple[int, int]] = []

    @property
    def full(self) -> bool:
        """Whether there is enough to choose from: `pool` dialogues, and ids for two batches."""
        return len(self.entries) >= self._config.pool and self._ids >= 2 * self._config.tokens_per_batch

    def add(self, dialogue: TokenizedDialogue, tag: Tag) -> None:
        """A dialogue of at most `max_ids` ids."""
        ids = dialogue.input_ids.shape[0]
        frames = max((clip.log_mel.shape[0] for clip in dialogue.clips), default=0)
        self.entries.append(Entry(dialogue, tag))
        self._new_lengths.append((ids, frames))
        self._ids += ids

    def take(self) -> list[Row]:
        """Remove the rows of one batch; none when nothing is left."""
        if not self.entries:
            return []
        if self._new_lengths:
            self._lengths = np.concatenate([self._lengths, np.array(self._new_lengths, dtype=np.int64)])
            self._new_lengths = []
        ids, frames = self._lengths.T
        if self._config.packed:
            chosen = choose_packed(ids, frames, self._config)
        else:
            chosen = [[place] for place in choose_padded(ids, frames, self._config)]
        rows = [[self.entries[place].dialogue for place in row] for row in chosen]
        gone = sorted((place for row in chosen for place in row), reverse=True)
        self._ids -= int(ids[gone].sum())
        self._lengths = np.delete(self._lengths, gone, axis=0)
        for place in gone:  # from the end, so that the others keep their places
            del self.entries[place]
        return rows


def choose_padded(ids: np.ndarray, frames: np.ndarray, config: BatchingConfig) -> list[int]:
    """Places of the dialogues of one padded batch: the first, and those that are padded least beside it.

    Of several sizes to pad to, in ids and in mel frames, each at least those of the first dialogue, the one is taken
    whose best rows are padded least. Time and memory grow as sizes times N: about 1 ms for 2,048 dialogues.

    Args:
        ids: [N] lengths of the dialogues.
        frames: [N] mel frames of each one's longest clip, 0 without one.
        config: Sizes.
    """
    widths = np.ceil(ids[0] * _GROWTH)
    heights = _frame_sizes(ids, frames)
    # A row that does not fit, or is not there, counts as one of nothing but padding.
    worst = 1.0 + config.frames_weight
    of_ids = np.where(ids <= widths[:, None], 1 - ids / widths[:, None], worst)  # [W, N]
    of_frames = np.where(frames > 0, 1 - frames / heights[:, None], 0.0)
    of_frames = np.where(frames <= heights[:, None], config.frames_weight * of_frames, worst)  # [H, N]
    best: list[int] = [0]
    least = np.inf
    for width, padded_ids in zip(widths, of_ids, strict=True):
        rows = max(1, min(config.max_rows, int(config.tokens_per_batch // width)))
        padding = np.minimum(padded_ids + of_frames, worst)  # [H, N]
        order = padding.copy()
        order[:, 0] = -1.0  # the oldest is in every batch
        chosen = np.argpartition(order, min(rows, len(ids)) - 1, axis=1)[:, :rows]
        taken = np.take_along_axis(padding, chosen, axis=1)
        shares = (taken.sum(axis=1) + worst * (rows - taken.shape[1])) / rows
        if shares.min() < least:
            least = shares.min()
            best = chosen[shares.argmin()][taken[shares.argmin()] < worst].tolist()
    return sorted(best)


def choose_packed(ids: np.ndarray, frames: np.ndarray, config: BatchingConfig) -> list[list[int]]:
    """Places of the dialogues of one packed batch, row by row: first-fit into rows of `max_ids`.

    Rows have room for dialogues of any length, so after the first come those whose clips are about as long as its own,
    or a little shorter: clips are what the encoder pads.

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
    most = config.max_ids
    for place in np.argsort(_packed_distance(frames), kind="stable").tolist():
        if lengths[place] > most:
            continue
        number = next(n for n, free in enumerate(room) if lengths[place] <= free)
        rows[number].append(place)
        room[number] -= lengths[place]
        most = max(room)
        if most <= enough:
            break
    return [row for row in rows if row]


def _frame_sizes(ids: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """[H] numbers of mel frames to pad a batch of the first dialogue to, at least its own.

    Where it has no clip, those of the one nearest in ids.
    """
    heard = frames > 0
    if not heard.any():
        return np.ones(1)
    nearness = np.where(heard, np.abs(np.log(ids / ids[0])), np.inf)
    least = frames[0] or frames[nearness.argmin()]
    return np.unique(np.ceil(least * _GROWTH / FRAME_MULTIPLE)) * FRAME_MULTIPLE


def _packed_distance(frames: np.ndarray) -> np.ndarray:
    """[N] how badly each one's clip goes with the first one's, where ids do not matter.

    Shorter clips are measured from what the first one's is padded to. Longer ones would have all the others padded, and
    come last. Dialogues without a clip are kept for batches whose clips find few of their like.
    """
    heard = frames > 0
    if not heard.any():
        return np.zeros(len(frames))
    first = int(frames[0] or frames[heard.argmax()])
    measure = -(-first // FRAME_MULTIPLE) * FRAME_MULTIPLE
    distance = np.log(np.where(heard, frames, measure) / measure)
    distance = np.where(distance > 0, _LONGER_WEIGHT * distance, -distance)
    distance = np.where(heard, distance, _SILENT_DISTANCE)
    distance[0] = -1.0  # the oldest is in every batch
    return distance


def padding_share(batch: PackedBatch) -> float:
    """Share of the batch's ids that are padding."""
    return 1.0 - batch.num_tokens / batch.document_ids.numel()


def frame_padding_share(batch: PackedBatch) -> float:
    """Share of the batch's mel frames that are padding, 0 without clips."""
    frames = batch.log_mels.shape[0] * batch.log_mels.shape[1]
    return 1.0 - int(batch.log_mel_lengths.sum()) / frames if frames else 0.0
