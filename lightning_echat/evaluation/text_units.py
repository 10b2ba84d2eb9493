"""How words and characters are counted: our own normalisation of English and Chinese text, and error counts on it.

English: NFKC, lower case, apostrophes close up (don't -> dont), everything else that is no letter or digit separates.
Chinese: NFKC, lower case, punctuation and spaces dropped; a unit is one Chinese character, or a run of Latin letters or
digits. Numbers are not spelled out, traditional characters are not made simplified, fillers are kept: who compares with
published figures must normalise as those did.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

from lightning_echat.metrics import normalize_english

_UNITS = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorCounts:
    """Edits that turn what was heard into what was said, over the reference's units."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    @property
    def errors(self) -> int:
        """All edits."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over reference units, NaN without any: units invented over nothing have no rate."""
        return self.errors / self.reference if self.reference else float("nan")


def words_of(text: str) -> list[str]:
    """The words of English text."""
    return normalize_english(text).split()


def characters_of(text: str, *, language: str) -> list[str]:
    """The characters of text: for zh as described above, for en letters and digits with single spaces between words."""
    if language == "zh":
        return _UNITS.findall(unicodedata.normalize("NFKC", text).lower())
    return list(normalize_english(text))


def count_errors(heard: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> ErrorCounts:
    """Edits over all pairs of unit sequences. A pair without reference counts its insertions and no units."""
    totals = [0, 0, 0, 0]
    for hypothesis, reference in zip(heard, said, strict=True):
        if not reference:
            totals[2] += len(hypothesis)
            continue
        found = _align(hypothesis, reference)
        for place, count in enumerate((found.substitutions, found.deletions, found.insertions, len(reference))):
            totals[place] += count
    return ErrorCounts(substitutions=totals[0], deletions=totals[1], insertions=totals[2], reference=totals[3])


def _align(hypothesis: Sequence[str], reference: Sequence[str]) -> jiwer.WordOutput:
    # A unit may itself be a space (a character of English), which would be split; as numbers they cannot be.
    number = {unit: str(place) for place, unit in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    as_text = [" ".join(number[unit] for unit in units) for units in (reference, hypothesis)]
    return jiwer.process_words(as_text[0], as_text[1])
