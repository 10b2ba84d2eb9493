"""One decoder for all tasks: thinking, text and speech codes, in the order that the task's layout asks for, batched.

Each row of a batch follows its own task. At every step a row writes either text or speech, and only ids of that kind
may come: text until the end of text, then speech from boundary to boundary; interleaved rows take 6 and 18 in turn
once their thinking is closed. Rows share the cache and the steps; a row that is done is fed padding until all are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from lightning_echat.contracts import IGNORE_INDEX, GeneratedReply, PackedBatch
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.speech_codes import SPEECH_CHUNK, TEXT_CHUNK, ids_to_codes
from lightning_echat.tokens.tasks import traits_of
from lightning_echat.tokens.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How answers are written.

    Attributes:
        max_text_ids: Text ids, thinking included, after which a row is cut short.
        max_speech_ids: Speech ids, boundaries included, after which a row is cut short. 25 are one second.
        temperature: 0 takes the best id; above, ids are sampled.
        top_k: Sample among so many ids; 0 for all.
        seed: Of the sampling.
    """

    max_text_ids: int = 128
    max_speech_ids: int = 375
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0


@torch.no_grad()
def generate(
    model: EChatModel,
    batch: PackedBatch,
    tokenizer: DialogueTokenizer,
    config: DecodingConfig,
    *,
    goes_on: Callable[[bool], bool] = bool,
) -> list[GeneratedReply]:
    """Answer every dialogue of a batch; targets in the batch are not looked at.

    Cost is one pass over the prompts and one step of the language model per id of the longest answer.

    Args:
        model: In eval mode.
        batch: Its references are what is asked.
        tokenizer: Templates and ids.
        config: Lengths and sampling.
        goes_on: Is told before each step whether a row still writes, and says whether to take the step. Ranks that
            share a sharded model answer alike, and so take the same number of steps.

    Returns:
        One reply per reference, in their order.
    """
    if not batch.references:
        return []
    started = time.perf_counter()
    prompts = extract_prompts(batch, padding=tokenizer.vocabulary.padding)
    embeddings, _ = model.hear(prompts, model.lm.embed(prompts.input_ids))
    valid = prompts.document_ids > 0
    cache = DynamicCache()
    hidden = model.lm(embeddings, position_ids=prompts.position_ids, attention_mask=valid.long(), cache=cache)
    lengths = valid.sum(1)
    last = hidden[torch.arange(len(lengths)), lengths - 1]
    prefilled = time.perf_counter()
    writers = _Writers(prompts, tokenizer, config)
    while goes_on(not bool(writers.done.all())):
        ids = writers.next_ids(model.lm.text_head(last).float(), model.lm.speech_head(last).float())
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
        embedded = model.lm.embed(ids[:, None])
        last = model.lm(embedded, position_ids=lengths[:, None], attention_mask=valid.long(), cache=cache)[:, 0]
        lengths = lengths + 1
    timings = {"prefill": prefilled - started, "total": time.perf_counter() - started}
    return writers.replies(timings)


class _Writers:
    """The state of all rows while they write: what each may write next, and what it has written."""

    def __init__(self, prompts: PackedBatch, tokenizer: DialogueTokenizer, config: DecodingConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.references = prompts.references
        self.vocabulary: Vocabulary = tokenizer.vocabulary
        device = prompts.input_ids.device
        names = [reference.task for reference in self.references]
        speaks = [traits_of(name).speaks for name in names]
        mixed = ["interleaved" in name for name in names]
        silent_text = [name == "text_to_speech" for name in names]
        self.speaks = torch.tensor(speaks, device=device)
        self.interleaved = torch.tensor(mixed, device=device)
        self.thinking = torch.tensor(["thinking" in name for name in names], device=device) & self.interleaved
        self.text_done = torch.tensor(silent_text, device=device)
        self.speech_done = ~self.speaks
        self.cut = torch.zeros_like(self.speaks)
        self.num_text = torch.zeros(len(names), dtype=torch.long, device=device)
        self.num_speech = torch.zeros_like(self.num_text)
        self.in_chunk = torch.zeros_like(self.num_text)
        self.writes_speech = self.text_done.clone()
        self.history: list[Tensor] = []
        self.generator = torch.Generator(device=device).manual_seed(config.seed)

    @property
    def done(self) -> Tensor:
        """[R] bool: nothing more to write."""
        return (self.text_done & self.speech_done) | self.cut

    def next_ids(self, text_logits: Tensor, speech_logits: Tensor) -> Tensor:
        """Choose one id per row and advance. [R, T], [R, S] logits -> [R] unified ids."""
        boundary = self.vocabulary.speech_size - 1
        text = self._choose(text_logits)
        speech = self._choose(speech_logits)
        # Speech opens with the boundary, so no row can end it before it began.
        speech = torch.where(self.num_speech == 0, boundary, speech)
        ids = torch.where(self.writes_speech, speech + self.vocabulary.first_code, text)
        done = self.done
        ids = torch.where(done, self.vocabulary.padding, ids)
        self.history.append(torch.where(done, IGNORE_INDEX, ids))
        self._advance(ids, ~done)
        return ids

    def _choose(self, logits: Tensor) -> Tensor:
        if self.config.temperature == 0:
            return logits.argmax(1)
        logits = logits / self.config.temperature
        if 0 < self.config.top_k < logits.shape[1]:
            least = logits.topk(self.config.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return torch.multinomial(logits.softmax(1), 1, generator=self.generator)[:, 0]

    def _advance(self, ids: Tensor, active: Tensor) -> None:
        wrote_speech = self.writes_speech & active
        wrote_text = ~self.writes_speech & active
        self.speech_done |= wrote_speech & (ids == self.vocabulary.speech_boundary) & (self.num_speech > 0)
        self.text_done |= wrote_text & (ids == self.vocabulary.end_of_text)
        self.num_text += wrote_text
        self.num_speech += wrote_speech
        self.cut |= (self.num_text >= self.config.max_text_ids) & ~self.text_done
        self.cut |= (self.num_speech >= self.config.max_speech_ids) & ~self.speech_done
        self.in_chunk += active
        self._close_thinking()
        self._switch()

    def _close_thinking(self) -> None:
        """Interleaving starts after the thinking, whose end may be any ids in a pretrained tokenizer: text tells."""
        if not bool(self.thinking.any()):
            return
        close = self.tokenizer.prompt_set.thinking.close
        # An id spells at least one byte, so the marker that the last id completes is among so many.
        tail = torch.stack(self.history[-max(16, len(close.encode())) :], dim=1)
        for row in self.thinking.nonzero()[:, 0].tolist():
            written = [i for i in tail[row].tolist() if i != IGNORE_INDEX]
            if close in self.tokenizer.decode(written) or bool(self.text_done[row]):
                self.thinking[row] = False
                self.in_chunk[row] = 0

    def _switch(self) -> None:
        """Decide for each row whether the next id is speech."""
        chunk_full = self.in_chunk >= torch.where(self.writes_speech, SPEECH_CHUNK, TEXT_CHUNK)
        alternate = self.interleaved & ~self.thinking & chunk_full
        wanted = self.writes_speech ^ alternate
        wanted = (wanted | self.text_done) & ~self.speech_done
        self.in_chunk = torch.where(wanted != self.writes_speech, 0, self.in_chunk)
        self.writes_speech = wanted

    def replies(self, timings: dict[str, float]) -> list[GeneratedReply]:
        """What was written, row by row."""
        written = torch.stack(self.history, dim=1).tolist() if self.history else [[] for _ in self.references]
        cut = self.cut.tolist()
        replies = []
        for reference, row, was_cut in zip(self.references, written, cut, strict=True):
            text_ids = [i for i in row if 0 <= i < self.vocabulary.text_size and i != self.vocabulary.end_of_text]
            replies.append(
                GeneratedReply(
                    reference=reference,
                    text_ids=text_ids,
                    text=self.tokenizer.decode(text_ids),
                    speech_codes=ids_to_codes(row, self.vocabulary),
                    finished=not was_cut,
                    timings=dict(timings),
                )
            )
        return replies


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
