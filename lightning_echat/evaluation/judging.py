"""What a judge of replies is, whatever stands behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True, kw_only=True)
class JudgeScore:
    """How well one reply answers the voice it was given.

    Attributes:
        total: 0 to 100 over all cues of the query, NaN where the query carries none.
        by_category: Category -> 0 to 100, for the categories that the query belongs to.
        per_dimension: Cue -> 0 to 100, for the cues that the query carries or the reply wrongly claims.
        verdicts: Cue -> what the judge decided about it, in one word.
        phrases: The wording that the verdicts rest on.
        on_topic: Whether the reply answers the words of the query.
    """

    total: float
    by_category: dict[str, float]
    per_dimension: dict[str, float]
    verdicts: dict[str, str] = field(default_factory=dict)
    phrases: list[str] = field(default_factory=list)
    on_topic: bool = False


class Judge(Protocol):
    """Scores replies."""

    @property
    def name(self) -> str:
        """Written beside every score; changes whenever the same reply may score differently."""
        ...

    def score(self, transcript: str, *, labels: Mapping[str, str], reply: str) -> JudgeScore:
        """Score `reply` to a query with these words, spoken by a voice with these labels."""
        ...
