"""One decoder for all tasks: thinking, text and speech codes, in the order that the task's layout asks for, batched.

Each row of a batch follows its own task. At every step a row writes either text or speech, scored by that head alone.
Rows share the cache and the steps; rows that are done leave the batch. What a row writes does not depend on the others.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_echat.contracts import IGNORE_INDEX, GeneratedReply, PackedBatch, UserError
from lightning_echat.conversation import ConversationMemory, GrowingCache, without_prefix
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.reply_writer import PHASES, Phase, ReplyLimits, ReplyWriter
from lightning_echat.sampling import RepetitionWindow, SamplingConfig, choose, uniforms_of
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK, TEXT_CHUNK, ids_to_codes


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How answers are written.

    Attributes:
        max_text_ids: Text ids, thinking included, after which a row is cut short.
        max_thinking_ids: Ids of thinking after which a row is cut short; 0 for no limit of its own.
        max_speech_ids: Speech ids, boundaries included, after which a row is cut short. 25 are one second.
        thinking, text, speech: How ids of each phase are chosen.
        silence_codes: Speech codes that the repetition penalty leaves alone: pauses repeat themselves.
        text_chunk, speech_chunk: Ids of each kind in a turn of interleaved answers; what the model was trained with.
        seed: Of the sampling. What an item draws follows from this and the item's key, whatever its batch.
    """

    max_text_ids: int = 128
    max_thinking_ids: int = 0
    max_speech_ids: int = 375
    thinking: SamplingConfig = field(default_factory=SamplingConfig)
    text: SamplingConfig = field(default_factory=SamplingConfig)
    speech: SamplingConfig = field(default_factory=SamplingConfig)
    silence_codes: tuple[int, ...] = ()
    text_chunk: int = TEXT_CHUNK
    speech_chunk: int = SPEECH_CHUNK
    seed: int = 0

    def sampling(self, phase: Phase) -> SamplingConfig:
        """How ids of a phase are chosen."""
        return {"thinking": self.thinking, "text": self.text, "speech": self.speech}[phase]

    @property
    def limits(self) -> ReplyLimits:
        """What a row has to keep to."""
        return ReplyLimits(
            text=self.max_text_ids,
            thinking=self.max_thinking_ids,
            speech=self.max_speech_ids,
            text_chunk=self.text_chunk,
            speech_chunk=self.speech_chunk,
        )


def generate(
    model: EChatModel,
    batch: PackedBatch,
    tokenizer: DialogueTokenizer,
    config: DecodingConfig,
    *,
    goes_on: Callable[[bool], bool] = bool,
    memory: ConversationMemory | None = None,
) -> list[GeneratedReply]:
    """Answer every dialogue of a batch; targets in the batch are not looked at.

    Cost is one pass over the prompts and one step of the language model per id of the longest answer, over the rows
    that still write. Nothing outlives the call but `memory`: calls in several threads do not know of each other.

    Args:
        model: In eval mode.
        batch: Its references are what is asked.
        tokenizer: Templates and ids.
        config: Lengths and sampling.
        goes_on: Is told before each step whether a row still writes, and says whether to take the step. Ranks that
            share a sharded model answer alike, and so take the same number of steps.
        memory: For a batch of one dialogue: what earlier turns left, and where this one is kept.

    Returns:
        One reply per reference, in their order.
    """
    if not batch.references:
        return []
    generation = Generation(model, batch, tokenizer, config, memory=memory)
    while goes_on(not generation.done):
        generation.step()
    return generation.replies()


class Generation:
    """The answers to a batch while they are written: the prompts are read at once, then `step` by `step`.

    Args:
        model, batch, tokenizer, config, memory: As for `generate`; the batch has at least one reference.

    Attributes:
        writers: One per reference: what it has written.
        prefill_seconds: What reading the prompts took, the encoder included.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: EChatModel,
        batch: PackedBatch,
        tokenizer: DialogueTokenizer,
        config: DecodingConfig,
        *,
        memory: ConversationMemory | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._model, self._tokenizer, self._config, self._memory = model, tokenizer, config, memory
        self._prompts = extract_prompts(batch, padding=tokenizer.vocabulary.padding)
        self._device = self._prompts.input_ids.device
        self._spelled = len(tokenizer.tokenizer)
        references = self._prompts.references
        self.writers = [ReplyWriter(reference.task, tokenizer, config.limits) for reference in references]
        self._open = list(range(len(references)))  # which reference each row of the shrinking batch answers
        self._cache = GrowingCache() if memory is None else memory.cache
        self._pending: Tensor | None = None  # [r] ids that were chosen and not yet read
        self._steps = 0
        self._windows = self._repetition_windows()
        self._uniforms = self._random_numbers()
        self._prefill()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.prefill_seconds = time.perf_counter() - self._started

    @property
    def done(self) -> bool:
        """Nothing more to write in any row."""
        return all(writer.done for writer in self.writers)

    @torch.no_grad()
    def step(self) -> None:
        """Write one id in every row that is not done. A step more than are needed changes nothing."""
        if self._pending is not None:
            self._drop_rows()
            self._read(self._pending)
        self._pending = self._choose()
        for reference, id in zip(self._open, self._pending.tolist(), strict=True):
            if not self.writers[reference].done:
                self.writers[reference].write(id)
        self._steps += 1

    def replies(self) -> list[GeneratedReply]:
        """What was written, reference by reference."""
        if self._memory is not None:
            self._memory.keep(self._prompts, self.writers[0].written.ids)
        timings = {"prefill": self.prefill_seconds, "total": time.perf_counter() - self._started}
        return [self._reply(place, timings) for place in range(len(self.writers))]

    def _reply(self, place: int, timings: dict[str, float]) -> GeneratedReply:
        ids, vocabulary = self.writers[place].written.ids, self._tokenizer.vocabulary
        text_ids = [i for i in ids if i < vocabulary.text_size and i != vocabulary.end_of_text]
        return GeneratedReply(
            reference=self._prompts.references[place],
            text_ids=text_ids,
            text=self._tokenizer.decode(text_ids),
            speech_codes=ids_to_codes(ids, vocabulary),
            finished=not self.writers[place].cut,
            timings=dict(timings),
        )

    def _prefill(self) -> None:
        prompts, lm = self._prompts, self._model.lm
        known = self._memory.recall(prompts) if self._memory is not None else 0
        fresh = without_prefix(prompts, known) if known else prompts
        embeddings, _ = self._model.hear(fresh, lm.embed(fresh.input_ids))
        # Padding stands behind everything that counts, so causal attention needs no mask, and positions count on.
        hidden = lm(embeddings, position_ids=None, attention_mask=None, cache=self._cache)
        valid = prompts.document_ids > 0
        self._lengths = valid.sum(1)
        self._last = hidden[torch.arange(len(hidden), device=self._device), self._lengths - 1 - known]
        # None while no row has a gap between its prompt and what it writes: attention is faster without a mask.
        self._valid = None if bool(valid.all()) else valid

    def _read(self, ids: Tensor) -> None:
        """Let the language model read one id per row: [r] -> the next `_last` [r, D]."""
        mask = None
        if self._valid is not None:
            self._valid = torch.cat([self._valid, self._valid.new_ones(len(ids), 1)], dim=1)
            mask = self._valid[:, None, None]
        lm = self._model.lm
        hidden = lm(lm.embed(ids[:, None]), position_ids=self._lengths[:, None], attention_mask=mask, cache=self._cache)
        self._last = hidden[:, 0]
        self._lengths = self._lengths + 1

    def _drop_rows(self) -> None:
        """Take rows that are done out of the batch, when they are many enough to be worth copying the others."""
        kept = [place for place, reference in enumerate(self._open) if not self.writers[reference].done]
        # One stays: other ranks may still write, and then this one has to go along.
        kept = kept or [0]
        if len(kept) > _WORTH_DROPPING * len(self._open):
            return
        assert self._pending is not None
        index = torch.tensor(kept, device=self._device)
        self._open = [self._open[place] for place in kept]
        self._pending, self._lengths = self._pending[index], self._lengths[index]
        self._valid = None if self._valid is None else self._valid[index]
        self._cache.keep_rows(index)

    def _choose(self) -> Tensor:
        """[r] the next id of every row: forced, or the choice of its phase's head; padding where nothing is to come."""
        ids = [self._tokenizer.vocabulary.padding] * len(self._open)
        everyone = list(range(len(self._open)))
        groups: dict[Phase, list[int]] = defaultdict(list)
        for place, reference in enumerate(self._open):
            writer = self.writers[reference]
            if writer.done:
                continue
            if (forced := writer.forced_id) is not None:
                ids[place] = forced
            else:
                groups[writer.phase].append(place)
        if list(groups.values()) == [everyone]:
            (phase,) = groups
            return self._choose_in(phase, everyone, self._last)
        chosen = torch.tensor(ids, device=self._device)
        for phase, places in groups.items():
            index = torch.tensor(places, device=self._device)
            chosen[index] = self._choose_in(phase, places, self._last[index])
        return chosen

    def _choose_in(self, phase: Phase, places: list[int], hidden: Tensor) -> Tensor:
        """[n] unified ids for the rows at `places`, all of which write this phase, from their hidden states [n, D]."""
        rows = torch.tensor([self._open[place] for place in places], device=self._device)
        lm = self._model.lm
        if phase == "speech":
            logits, first = lm.speech_head(hidden), self._tokenizer.vocabulary.first_code
        else:
            # Rows of the embedding that no text id owns have no spelling.
            logits, first = lm.text_head(hidden)[:, : self._spelled], 0
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        window = self._windows.get(phase)
        if window is not None:
            logits = window.penalise(logits, rows)
        uniforms = None if self._uniforms is None else self._uniforms[rows, self._steps]
        ids = choose(logits, self._config.sampling(phase), uniforms)
        if window is not None:
            window.add(ids, rows)
        return ids + first

    def _repetition_windows(self) -> dict[Phase, RepetitionWindow]:
        """Of the phases that have a penalty."""
        boundary = self._tokenizer.vocabulary.codebook_size
        if wrong := [code for code in self._config.silence_codes if not 0 <= code < boundary]:
            raise UserError(f"decoding.silence_codes: {wrong[0]} is no speech code; they are 0 to {boundary - 1}")
        return {
            phase: RepetitionWindow(
                len(self.writers),
                self._config.sampling(phase),
                exempt=self._config.silence_codes if phase == "speech" else (),
                device=self._device,
            )
            for phase in PHASES
            if self._config.sampling(phase).repetition_penalty > 1
        }

    def _random_numbers(self) -> Tensor | None:
        """[R, steps] where anything is drawn. Each row has its own, one for each step that it may take."""
        if all(self._config.sampling(phase).temperature == 0 for phase in PHASES):
            return None
        keys = [reference.key for reference in self._prompts.references]
        steps = self._config.max_text_ids + self._config.max_speech_ids
        return uniforms_of(keys, seed=self._config.seed, steps=steps).to(self._device)


_WORTH_DROPPING = 0.75
"""Rows are taken out when no more than this share of them still writes."""


def extract_prompts(batch: PackedBatch, *, padding: int) -> PackedBatch:
    """Cut every dialogue of a batch, packed or not, down to its prompt: one row each, nothing supervised."""
    references = batch.references
    lengths = [reference.prompt_length for reference in references]
    size = (len(references), max(lengths))
    input_ids = batch.input_ids.new_full(size, padding)
    for row, (reference, length) in enumerate(zip(references, lengths, strict=True)):
        input_ids[row, :length] = batch.input_ids[reference.row, reference.start : reference.start + length]
    positions = torch.arange(size[1], device=input_ids.device).expand(size)
    valid = positions < torch.tensor(lengths, device=input_ids.device)[:, None]
    # A clip belongs to the dialogue whose span in the batch it lies in.
    rows, starts = batch.clip_rows.clone(), batch.clip_starts.clone()
    for row, reference in enumerate(references):
        inside = (batch.clip_rows == reference.row) & (batch.clip_starts >= reference.start)
        inside &= batch.clip_starts < reference.start + reference.length
        rows[inside] = row
        starts[inside] = batch.clip_starts[inside] - reference.start
    return replace(
        batch,
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        speech_scored=torch.zeros_like(valid),
        position_ids=positions.contiguous(),
        document_ids=valid.long(),
        clip_rows=rows,
        clip_starts=starts,
        references=[
            replace(reference, row=row, start=0, length=length)
            for row, (reference, length) in enumerate(zip(references, lengths, strict=True))
        ],
    )
