"""What is measured of an answer: words, labels, thinking. Everything here sums over ranks exactly.

`parse_answer` reads what the model wrote, `UnderstandingMetrics` compares it with the references. Callbacks use both
while a model trains and the evaluation uses both afterwards, so a curve and a table never disagree. A figure without
data is NaN in a metric and absent from a dict of scalars; an answer that cannot be read counts as wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import WordErrorRate

from lightning_echat.contracts import DialogueReference, GeneratedReply
from lightning_echat.tokens.paralinguistics import LABEL_SETS, parse_label_tags
from lightning_echat.tokens.tasks import traits_of
from lightning_echat.tokens.thinking import ThinkingFormat, parse_thinking

UNPARSED = "unparsed"
"""The last column of a confusion matrix: answers that named no label of the set."""

_APOSTROPHES = re.compile(r"['’‘ʼ`´]")


def normalize_english(text: str) -> str:
    """Lower-case words separated by one space. Apostrophes close up (don't -> dont), other punctuation separates."""
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text)).lower()
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAnswer:
    """What an answer says, whichever task it answers.

    Attributes:
        transcribes: The task asks for the words heard, so a missing transcript is an error.
        thinks: The task asks for thinking, so missing thinking is an error.
        asked_labels: The label sets that the task asks for.
        transcript: The words heard, None where the answer holds none.
        labels: Label set -> label, only labels that exist.
        reply_emotion: The emotion chosen for the reply, None where the answer names none.
        reply: What is said to the user; empty for a task that does not converse.
        well_formed: The thinking can be read in full.
    """

    transcribes: bool = False
    thinks: bool = False
    asked_labels: tuple[str, ...] = ()
    transcript: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    reply_emotion: str | None = None
    reply: str = ""
    well_formed: bool = False


def parse_answer(reply: GeneratedReply, *, fmt: ThinkingFormat | None = None) -> ParsedAnswer:
    """Read an answer as its task writes it: words and label tags, thinking and a reply, or a reply alone.

    Args:
        reply: The answer, with the dialogue that was asked.
        fmt: The wording of thinking, that of the prompt set that the model was trained with.
    """
    reference = reply.reference
    traits = traits_of(reference.task)
    if not traits.converses:
        words, labels = parse_label_tags(reply.text, reference.asked_labels)
        return ParsedAnswer(
            transcribes=traits.transcribes,
            asked_labels=reference.asked_labels,
            transcript=words if traits.transcribes else None,
            labels=labels,
        )
    if _thinks(reference.task):
        return _parse_thoughtful(reply, fmt or ThinkingFormat())
    return ParsedAnswer(reply=reply.text.strip())


def _parse_thoughtful(reply: GeneratedReply, fmt: ThinkingFormat) -> ParsedAnswer:
    parsed = parse_thinking(reply.text, fmt)
    return ParsedAnswer(
        transcribes=True,
        thinks=True,
        # Thinking writes every label that is known of the query.
        asked_labels=tuple(name for name in fmt.fields if name in reply.reference.labels),
        transcript=parsed.transcript,
        labels=parsed.labels,
        reply_emotion=parsed.reply_emotion,
        reply=parsed.reply,
        well_formed=parsed.well_formed,
    )


def _thinks(task_name: str) -> bool:
    """Whether the name of a task (see `DialogueTask.name`) asks for thinking."""
    return any(option.endswith("_thinking") for option in task_name.split(".")[1:])


class _ExactMetric(Metric):
    """A metric whose sums keep their type.

    `bf16-true` casts everything inside a module, and a sum in bfloat16 stops growing after a few hundred items.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        types = {name: getattr(self, name).dtype for name in self._defaults}
        super()._apply(fn, exclude_state)
        for name, dtype in types.items():
            setattr(self, name, getattr(self, name).to(dtype))
            default = self._defaults[name]
            assert isinstance(default, Tensor)
            self._defaults[name] = default.to(dtype)
        return self


class _Ratio(_ExactMetric):
    """A sum over a sum, NaN while there is nothing to divide by."""

    part: Tensor
    whole: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("part", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("whole", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """The ratio; 0 / 0 is NaN, and a part without a whole does not occur."""
        return self.part / self.whole


class MeanTokenLoss(_Ratio):
    """Mean loss a supervised token, over all batches and ranks, however unequal they are."""

    higher_is_better = False

    def update(self, loss_sum: Tensor | float, num_tokens: Tensor | int) -> None:
        """Add a summed loss and the number of tokens it was summed over."""
        self.part += loss_sum.detach().double() if isinstance(loss_sum, Tensor) else loss_sum
        self.whole += num_tokens


class ThinkingParseRate(_Ratio):
    """The share of answers whose thinking can be read in full."""

    higher_is_better = True

    def update(self, well_formed: Sequence[bool]) -> None:
        """Add answers to tasks that ask for thinking."""
        self.part += sum(well_formed)
        self.whole += len(well_formed)


class MeanScore(_Ratio):
    """Mean of scores, each counting once."""

    higher_is_better = True

    def update(self, scores: Iterable[float]) -> None:
        """Add scores."""
        scores = list(scores)
        self.part += sum(scores)
        self.whole += len(scores)


class EnglishWordErrorRate(_ExactMetric, WordErrorRate):
    """Word errors over reference words, after `normalize_english`."""

    def update(self, preds: str | list[str], target: str | list[str]) -> None:
        """Add transcripts and their references."""
        preds, target = ([texts] if isinstance(texts, str) else texts for texts in (preds, target))
        super().update([normalize_english(text) for text in preds], [normalize_english(text) for text in target])

    def compute(self) -> Tensor:
        """The rate, NaN without reference words: words invented over nothing have no rate."""
        return torch.where(self.total > 0, super().compute(), torch.nan)


class LabelAccuracy(_ExactMetric):
    """How well one label set is named, from one confusion matrix.

    Rows are the true labels, columns the answers, in the order of `LABEL_SETS`; a last column counts answers that
    named no label of the set. Those are wrong for the accuracy and missed for the F1, so silence never pays.
    """

    higher_is_better = True
    confusion: Tensor

    def __init__(self, label_set: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes = LABEL_SETS[label_set]
        shape = (len(self.classes), len(self.classes) + 1)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, answers: Sequence[str | None], truths: Sequence[str]) -> None:
        """Add the labels that were named (None: unparsed) and the true ones."""
        for answer, truth in zip(answers, truths, strict=True):
            column = len(self.classes) if answer is None else self.classes.index(answer)
            self.confusion[self.classes.index(truth), column] += 1

    def compute(self) -> dict[str, Tensor]:
        """`accuracy`, `macro_f1`, `majority_baseline` (NaN without data) and the `confusion` matrix."""
        confusion = self.confusion.double()
        total = confusion.sum()
        return {
            "accuracy": confusion.diagonal().sum() / total,
            "macro_f1": _macro_f1(confusion),
            "majority_baseline": confusion.sum(dim=1).max() / total,
            "confusion": self.confusion,
        }


def _macro_f1(confusion: Tensor) -> Tensor:
    """Mean F1 over the classes that occur, as a truth or as an answer: a class that nobody met says nothing."""
    hits = confusion.diagonal()
    occurrences = confusion.sum(dim=1) + confusion[:, :-1].sum(dim=0)
    met = occurrences > 0
    return (2 * hits[met] / occurrences[met]).mean()


class UnderstandingMetrics:
    """Everything that is measured of what a model hears, over any mixture of tasks.

    Under a process group `compute` and `confusions` are collective: every rank calls them, whatever it has seen.

    Args:
        device: Where the sums stand; that of the model, so that ranks can add them up.
    """

    def __init__(self, *, device: torch.device | str = "cpu") -> None:
        self._labels = {name: LabelAccuracy(name).to(device) for name in LABEL_SETS}
        self._word_errors = EnglishWordErrorRate().to(device)
        self._parse_rate = ThinkingParseRate().to(device)

    def update(self, references: Sequence[DialogueReference], answers: Sequence[ParsedAnswer]) -> None:
        """Add answers, each beside the dialogue it answers."""
        pairs = list(zip(references, answers, strict=True))
        for name, metric in self._labels.items():
            asked = [(a.labels.get(name), r.labels[name]) for r, a in pairs if name in a.asked_labels]
            metric.update([answer for answer, _ in asked], [truth for _, truth in asked])
        heard = [(a.transcript or "", r.transcript) for r, a in pairs if a.transcribes and r.transcript]
        self._word_errors.update([words for words, _ in heard], [truth for _, truth in heard])
        self._parse_rate.update([answer.well_formed for answer in answers if answer.thinks])

    def compute(self) -> dict[str, float]:
        """Name -> value, without the figures that there is no data for.

        Names: `accuracy/<label set>`, `macro_f1/<label set>`, `majority_baseline/<label set>`, `wer`,
        `think_parse_rate`.
        """
        values: dict[str, Tensor] = {}
        for name, metric in self._labels.items():
            scores = metric.compute()
            values |= {f"{what}/{name}": scores[what] for what in ("accuracy", "macro_f1", "majority_baseline")}
        values["wer"] = self._word_errors.compute()
        values["think_parse_rate"] = self._parse_rate.compute()
        return {name: float(value) for name, value in values.items() if not value.isnan()}

    def confusions(self) -> dict[str, Tensor]:
        """Label set -> [classes, classes + 1] int64 counts (see `LabelAccuracy`), for the sets that were asked for."""
        matrices = {name: metric.compute()["confusion"].cpu() for name, metric in self._labels.items()}
        return {name: matrix for name, matrix in matrices.items() if matrix.any()}
