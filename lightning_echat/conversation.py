"""Keys and values that outlive a step, and a turn: a cache that grows in place, and what a conversation keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lightning_echat.contracts import PackedBatch

_BLOCK = 256
"""Columns that a cache grows by, at least; it doubles where it is longer, so that copying stays linear."""


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room: a step writes its column and copies none of the others.

    The layer that it derives from joins old and new at every step, which for many rows is a good part of the step.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [R, heads, n, width] behind what is there; all of it, as views of the buffer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers or end > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, length=start, capacity=max(end + _BLOCK, 2 * start))
        for buffer, fresh in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = fresh
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _grow(self, *states: Tensor, length: int, capacity: int) -> None:
        old = self._buffers
        self._buffers = [s.new_empty((*s.shape[:-2], capacity, s.shape[-1])) for s in states]
        for buffer, kept in zip(self._buffers, old, strict=False):
            buffer[..., :length, :] = kept[..., :length, :]

    def keep(self, *, rows: Tensor | slice = slice(None), length: int) -> None:
        """Forget all but these rows and first columns."""
        self._buffers = [buffer[rows] for buffer in self._buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)


class GrowingCache(Cache):
    """An empty cache for any number of layers, whose steps cost no copy of what is already there."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_GrowingLayer)

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but these ([r] indices)."""
        self._keep(rows=rows, length=self.get_seq_length())

    def keep_first(self, length: int) -> None:
        """Forget all columns but the first ones."""
        self._keep(length=length)

    def _keep(self, *, rows: Tensor | slice = slice(None), length: int) -> None:
        for layer in self.layers:
            assert isinstance(layer, _GrowingLayer)
            layer.keep(rows=rows, length=length)


@dataclass(slots=True, kw_only=True)
class _Clip:
    start: int
    length: int
    log_mel: Tensor


@dataclass(slots=True)
class ConversationMemory:
    """What the language model has already read of one conversation: a later turn reads only what is new.

    The next prompt is compared with what was read, id by id and clip by clip. The part that agrees from the start on
    is kept, so answers are those of a fresh reading whatever the template carries along. A memory belongs to one
    conversation and one model, and is no use to two answers at once.

    Attributes:
        ids: What the cache holds, column by column.
        clips: The audio among it.
        cache: Keys and values.
        reused: Ids of the last prompt that were not read again.
    """

    ids: list[int] = field(default_factory=list)
    clips: list[_Clip] = field(default_factory=list)
    cache: GrowingCache = field(default_factory=GrowingCache)
    reused: int = 0

    def recall(self, prompt: PackedBatch) -> int:
        """How many ids of a prompt (one row) need not be read again; everything behind them is forgotten."""
        if len(prompt.references) != 1:
            raise ValueError(f"a conversation has one prompt at a time, not {len(prompt.references)}")
        asked = prompt.input_ids[0].tolist()
        # The last id is read in any case: its hidden state is what the answer starts from.
        limit = min(len(self.ids), len(asked) - 1)
        common = next((at for at in range(limit) if self.ids[at] != asked[at]), limit)
        for clip, other in zip(self.clips, clips_of(prompt), strict=False):
            if (clip.start, clip.length) != (other.start, other.length) or not torch.equal(clip.log_mel, other.log_mel):
                common = min(common, clip.start, other.start)
                break
        self.cache.keep_first(common)
        self.ids = self.ids[:common]
        self.clips = [clip for clip in self.clips if clip.start + clip.length <= common]
        self.reused = common
        return common

    def keep(self, prompt: PackedBatch, written: list[int]) -> None:
        """Note what the cache holds after an answer: the prompt, and the written ids that were read again."""
        ids = [*prompt.input_ids[0].tolist(), *written]
        self.ids = ids[: self.cache.get_seq_length()]
        self.clips = clips_of(prompt)


def clips_of(prompt: PackedBatch) -> list[_Clip]:
    """The clips of a prompt of one row."""
    spans = zip(prompt.clip_starts.tolist(), prompt.clip_lengths.tolist(), prompt.log_mel_lengths.tolist(), strict=True)
    return [
        _Clip(start=start, length=length, log_mel=prompt.log_mels[number, :frames])
        for number, (start, length, frames) in enumerate(spans)
    ]


def without_prefix(prompt: PackedBatch, known: int) -> PackedBatch:
    """A prompt of one row without its first ids and their clips; positions go on from there."""
    fresh = prompt.clip_starts >= known
    return replace(
        prompt,
        input_ids=prompt.input_ids[:, known:],
        labels=prompt.labels[:, known:],
        speech_scored=prompt.speech_scored[:, known:],
        position_ids=prompt.position_ids[:, known:],
        document_ids=prompt.document_ids[:, known:],
        clip_starts=prompt.clip_starts[fresh] - known,
        **{name: getattr(prompt, name)[fresh] for name in _BY_CLIP},
    )


_BY_CLIP = (
    "log_mels",
    "log_mel_lengths",
    "clip_rows",
    "clip_lengths",
    "clip_labels",
    "clip_characters",
    "clip_character_lengths",
    "clip_transcript_ids",
    "clip_transcript_lengths",
)
