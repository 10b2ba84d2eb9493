"""Every key that a training logs, and which way is better: what the README lists and W&B's summaries go by.

A key is a pattern: SET stands for a validation set, the other capitals for the names in `STANDS_FOR`, and a `*` at the
end for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_echat.tokens.paralinguistics import LABEL_SETS

Better = Literal["higher", "lower", ""]

STANDS_FOR: dict[str, tuple[str, ...]] = {
    "LABELS": tuple(LABEL_SETS),
    "PART": ("text", "speech", "ctc", "text_ctc", "labels"),
    "CATEGORY": ("emotion", "age", "gender", "event", "multi", "mean"),
    "RATE": ("wer", "cer", "mean_wer"),
    "FAULT": ("silent_share", "truncated_share", "repeated_share"),
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row.

    Attributes:
        key: The pattern.
        better: The direction; empty where neither is better.
    """

    key: str
    better: Better

    def matches(self, key: str) -> bool:
        """Whether a logged key is one of this row."""
        pattern = re.escape(self.key).replace("SET", "[^/]+").replace(r"\*", ".+")
        for place, names in STANDS_FOR.items():
            pattern = pattern.replace(place, f"({'|'.join(names)})")
        return re.fullmatch(pattern, key) is not None

    def expanded(self, sets: Sequence[str]) -> Iterator[str]:
        """The keys of a training with these validation sets; a `*` at the end stays."""
        keys = [self.key]
        for place, names in {"SET": sets, **STANDS_FOR}.items():
            keys = [key.replace(place, name) for key in keys for name in (names if place in key else [""])]
        yield from keys


METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "lower"),
    Metric("train/loss/PART", "lower"),
    Metric("train/ctc_share", "higher"),
    Metric("train/text_ctc_share", "higher"),
    Metric("lr-*", ""),
    Metric("val/SET/loss/text", "lower"),
    Metric("val/SET/loss/speech", "lower"),
    Metric("val/SET/accuracy/LABELS", "higher"),
    Metric("val/SET/macro_f1/LABELS", "higher"),
    Metric("val/SET/majority_baseline/LABELS", ""),
    Metric("val/SET/wer", "lower"),
    Metric("val/SET/think_parse_rate", "higher"),
    Metric("val/SET/empathy/count", ""),
    Metric("val/SET/empathy/CATEGORY", "higher"),
    Metric("val/SET/speech/RATE", "lower"),
    Metric("val/SET/speech/FAULT", "lower"),
    Metric("val/SET/speech/seconds", ""),
    Metric("val/SET/speech/seconds_per_word", ""),
    Metric("val/SET/speech/emotion/probability", "higher"),
    Metric("val/SET/speech/emotion/accuracy", "higher"),
    Metric("val/SET/speech/emotion/cross_entropy", "lower"),
    Metric("val/SET/spoken", ""),
    Metric("val/SET/confusion/LABELS", ""),
    Metric("val/SET/dialogues", ""),
    Metric("perf/steps_per_second", "higher"),
    Metric("perf/tokens_per_second", "higher"),
    Metric("perf/supervised_tokens_per_second", "higher"),
    Metric("perf/audio_seconds_per_second", "higher"),
    Metric("perf/padding_share", "lower"),
    Metric("perf/data_wait_share", "lower"),
    Metric("perf/mfu", "higher"),
    Metric("data/read", ""),
    Metric("data/kept", ""),
    Metric("data/skipped/*", "lower"),
    Metric("data/noticed/*", "lower"),
    Metric("data/drawn/*", ""),
    Metric("data/drawn_ids/*", ""),
    Metric("data/drawn_share/*", ""),
    Metric("data/asked_share/*", ""),
    Metric("data/epochs/*", ""),
)
"""The first row that matches counts."""

BOOKKEEPING = ("epoch", "trainer/global_step")
"""What Lightning logs beside every metric, to be plotted against."""


def metric_of(key: str) -> Metric | None:
    """The row of a logged key; None for one that the table lacks."""
    return next((metric for metric in METRICS if metric.matches(key)), None)


def best_values(sets: Sequence[str]) -> dict[str, Literal["min", "max"]]:
    """Key -> what W&B shall keep of it, for the scalars of a training's quality.

    Speed and counts are left out: their last value is the one that counts. Every key is spelled out, as W&B keeps no
    best value of what a pattern matches.
    """
    quality = [m for m in METRICS if m.better and m.key.startswith(("train/", "val/"))]
    return {key: "min" if metric.better == "lower" else "max" for metric in quality for key in metric.expanded(sets)}
