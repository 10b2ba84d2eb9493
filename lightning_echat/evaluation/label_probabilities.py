"""How sure a model is of the labels it names: the probability of each label of a set where it wrote one.

A teacher-forced pass over the model's own answer. A label may be several tokens, so every context that a label's tokens
stand in is read once; contexts that begin alike share a row. Where each tag is one token, as in the quickstart, all
label sets of an answer are read off a single row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lightning_echat.contracts import IGNORE_INDEX, TokenizedDialogue
from lightning_echat.data.batching import collate
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.paralinguistics import LABEL_SETS, write_label, write_label_tags

_ROWS_AT_ONCE = 64
_POSITIONS_AT_ONCE = 256
"""Full-vocabulary scores exist for so many positions at a time."""

_Ids = tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class NamedLabels:
    """An answer that names labels, and the prompt it answers.

    Attributes:
        prompt: As `DialogueTokenizer.prompt` gives it.
        words: What the answer holds before its tags.
        labels: Label set -> label, what it named.
    """

    prompt: TokenizedDialogue
    words: str
    labels: Mapping[str, str]


@torch.no_grad()
def label_probabilities(
    model: EChatModel, tokenizer: DialogueTokenizer, answers: Sequence[NamedLabels], *, device: torch.device
) -> list[dict[str, dict[str, float]]]:
    """Label set -> label -> probability among the labels of its set, for each answer.

    A set is scored given the words and the labels before it as the model wrote them, so the first set that an answer
    does not name, and those after it, are left out. Costs a pass over the prompts for each row of contexts.
    """
    candidates = [_candidates(answer, tokenizer) for answer in answers]
    rows: list[tuple[int, _Ids]] = []
    for place, sets in enumerate(candidates):
        contexts = {ids[:-1] for labels in sets.values() for ids in labels.values()}
        rows += [(place, context) for context in contexts if not _begins_another(context, contexts)]
    scores: list[dict[_Ids, Tensor]] = [{} for _ in answers]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        read = _scored(model, tokenizer, answers, part, candidates, device)
        for (place, context), found in zip(part, read, strict=True):
            scores[place].update({context[:length]: row for length, row in found.items()})
    return [
        {name: _normalised(labels, scores[place]) for name, labels in sets.items()}
        for place, sets in enumerate(candidates)
    ]


def _candidates(answer: NamedLabels, tokenizer: DialogueTokenizer) -> dict[str, dict[str, _Ids]]:
    """Label set -> label -> ids of the answer up to that label's tag."""
    found: dict[str, dict[str, _Ids]] = {}
    before = answer.words
    for name in answer.prompt.reference.asked_labels:
        if name not in answer.labels:
            break
        found[name] = {label: tuple(tokenizer.encode(before + write_label(label))) for label in LABEL_SETS[name]}
        before += write_label_tags([answer.labels[name]])
    return found


def _begins_another(context: _Ids, contexts: set[_Ids]) -> bool:
    return any(len(other) > len(context) and other[: len(context)] == context for other in contexts)


def _shared(labels: Mapping[str, _Ids]) -> int:
    """Ids that all labels of a set begin with."""
    shared = 0
    for column in zip(*labels.values(), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def _scored(
    model: EChatModel,
    tokenizer: DialogueTokenizer,
    answers: Sequence[NamedLabels],
    rows: Sequence[tuple[int, _Ids]],
    candidates: Sequence[Mapping[str, Mapping[str, _Ids]]],
    device: torch.device,
) -> list[dict[int, Tensor]]:
    """For each row: length of a context -> [T] log-probabilities of the next text id."""
    dialogues = [_row(answers[place].prompt, context) for place, context in rows]
    batch = move_data_to_device(collate(dialogues, padding=tokenizer.vocabulary.padding), device)
    hidden = model(batch).hidden_states
    wanted: list[tuple[int, int, int]] = []
    for row, (place, context) in enumerate(rows):
        first = answers[place].prompt.reference.prompt_length - 1
        for length in sorted(_lengths(candidates[place], context)):
            wanted.append((row, first + length, length))
    found: list[dict[int, Tensor]] = [{} for _ in rows]
    for start in range(0, len(wanted), _POSITIONS_AT_ONCE):
        part = wanted[start : start + _POSITIONS_AT_ONCE]
        at = hidden[[row for row, _, _ in part], [position for _, position, _ in part]]
        for (row, _, length), scores in zip(part, model.lm.text_head(at).float().log_softmax(1).cpu(), strict=True):
            found[row][length] = scores
    return found


def _lengths(sets: Mapping[str, Mapping[str, _Ids]], row: _Ids) -> set[int]:
    """Lengths of the contexts within a row after which labels of some set part."""
    return {
        length
        for labels in sets.values()
        for ids in labels.values()
        for length in range(_shared(labels), len(ids))
        if ids[:length] == row[:length] and length <= len(row)
    }


def _row(prompt: TokenizedDialogue, context: _Ids) -> TokenizedDialogue:
    ids = torch.cat([prompt.input_ids, torch.tensor(context, dtype=torch.long)])
    reference = replace(prompt.reference, length=len(ids))
    return replace(prompt, input_ids=ids, labels=torch.full_like(ids, IGNORE_INDEX), reference=reference)


def _normalised(labels: Mapping[str, _Ids], scores: Mapping[_Ids, Tensor]) -> dict[str, float]:
    """Probabilities among the labels of a set from the chances of their ids."""
    shared = _shared(labels)
    logs = torch.stack(
        [
            torch.stack([scores[ids[:length]][ids[length]] for length in range(shared, len(ids))]).sum()
            for ids in labels.values()
        ]
    )
    return dict(zip(labels, logs.double().softmax(0).tolist(), strict=True))
