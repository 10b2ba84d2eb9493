"""Controls: the same items asked with something taken away or given, so that a score can be read.

- `text_only`: the words without the voice. What a model scores above it is what hearing gave it.
- `label_oracle`: the thinking is begun with the true words and labels, and the model goes on from there: what it would
  score if it heard everything right.
- `neutral_voice`: the same words in a neutral voice, where the item set brings one.
- `shuffled_audio`: the query of another item of the batch. What is left is chance.

Replies are scored against the item's own words and labels, whatever was heard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Literal

import torch

from lightning_echat.contracts import IGNORE_INDEX, GeneratedReply, SampleRejected, TokenizedDialogue
from lightning_echat.data.decoding import ParsedDialogue
from lightning_echat.evaluation.item_sets import PosedItem, query_audio_of, with_audio_of
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.tasks import DialogueTask
from lightning_echat.tokens.thinking import ThinkingFormat, write_label_thinking, write_natural_thinking

ControlName = Literal["text_only", "label_oracle", "neutral_voice", "shuffled_audio"]

SHUFFLE = "random cycle"
"""How audio is shuffled. Answers that were shuffled otherwise are made anew."""
_ANY_EMOTION = "neutral"
_NATURAL_CHOICE = " i will sound"


@dataclass(slots=True, kw_only=True)
class ForcedPrompt:
    """A prompt whose answer has been begun.

    Attributes:
        dialogue: The prompt and the forced beginning, all of it read and none written by the model.
        ids: The forced ids.
    """

    dialogue: TokenizedDialogue
    ids: list[int]


def why_left_out(control: ControlName, *, task: DialogueTask, has_neutral: bool) -> str:
    """Why a control cannot be asked of this task and set; empty where it can."""
    if control == "label_oracle" and task.thinking == "none":
        return "the model does not think, so that there is no place to give it the labels"
    if control == "neutral_voice" and not has_neutral:
        return "the item set brings no neutral voice (neutral_audio)"
    return ""


def partners_of(keys: Sequence[str]) -> list[int]:
    """Whose audio each item of a batch hears when audio is shuffled: places in the batch, never an item's own.

    The items are put in a random order and each hears the next. The order follows from the keys, so that a batch that
    is made again is the same. A fixed distance would not do: item sets go through categories and labels in turn, and
    the partner would always have the same label, or never.
    """
    order = list(range(len(keys)))
    Random("\n".join(keys)).shuffle(order)
    partners = [0] * len(keys)
    for place, partner in pairwise([*order, *order[:1]]):
        partners[place] = partner
    return partners


def dialogues_of(control: ControlName | None, batch: Sequence[PosedItem]) -> list[ParsedDialogue | SampleRejected]:
    """The dialogues that a control asks in place of the items' own, or why one cannot be asked."""
    if control == "neutral_voice":
        return [
            with_audio_of(posed, posed.neutral_audio)
            if posed.neutral_audio is not None
            else SampleRejected("no neutral voice", posed.item.key)
            for posed in batch
        ]
    if control == "shuffled_audio":
        if len(batch) < 2:
            return [SampleRejected("no other item in the batch to hear", posed.item.key) for posed in batch]
        others = [batch[partner] for partner in partners_of([posed.item.key for posed in batch])]
        return [with_audio_of(posed, query_audio_of(other)) for posed, other in zip(batch, others, strict=True)]
    return [posed.parsed for posed in batch]


def force_labels(prompt: TokenizedDialogue, tokenizer: DialogueTokenizer, task: DialogueTask) -> ForcedPrompt:
    """Begin the thinking with what there is to hear, up to the emotion of the reply, which the model chooses."""
    reference = prompt.reference
    begun = tokenizer.encode(true_thinking(reference.transcript, reference.labels, task, tokenizer.prompt_set.thinking))
    ids = torch.cat([prompt.input_ids, torch.tensor(begun, dtype=torch.long)])
    longer = replace(reference, prompt_length=len(ids), length=len(ids))
    dialogue = replace(prompt, input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), reference=longer)
    return ForcedPrompt(dialogue=dialogue, ids=begun)


def true_thinking(transcript: str, labels: dict[str, str], task: DialogueTask, fmt: ThinkingFormat) -> str:
    """The thinking of one who heard everything right, up to the choice of the reply's emotion."""
    if task.thinking == "natural":
        said = write_natural_thinking(transcript, labels, _ANY_EMOTION)
        return fmt.open + said[: said.rindex(_NATURAL_CHOICE)]
    said = write_label_thinking(transcript, labels, _ANY_EMOTION, fmt)
    # Without the space before the tag: many tokenizers hold both as one token.
    return (said[: said.rindex(fmt.reply_emotion)] + fmt.reply_emotion).rstrip()


def with_forced(reply: GeneratedReply, forced: ForcedPrompt, tokenizer: DialogueTokenizer) -> GeneratedReply:
    """The answer as the model would have written it from the beginning."""
    ids = [*forced.ids, *reply.text_ids]
    return replace(reply, text_ids=ids, text=tokenizer.decode(ids))
