"""Every key that a training logs, and which way is better: what the README lists and W&B's summaries go by.

A key is a pattern: SET stands for a validation set, LABELS for a label set, and a `*` at the end for anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_echat.tokens.paralinguistics import LABEL_SETS

Better = Literal["higher", "lower", ""]


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
        pattern = re.escape(self.key).replace("SET", "[^/]+").replace("LABELS", f"({'|'.join(LABEL_SETS)})")
        return re.fullmatch(pattern.replace(r"\*", ".+"), key) is not None

    def expanded(self, sets: Sequence[str]) -> Iterator[str]:
        """The keys of a training with these validation sets; a `*` at the end stays."""
        for name in sets if "SET" in self.key else [""]:
            for labels in LABEL_SETS if "LABELS" in self.key else [""]:
                yield self.key.replace("SET", name).replace("LABELS", labels)


METRICS: tuple[Metric, ...] = (
    Metric("train/loss", "lower"),
    Metric("train/loss/*", "lower"),
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
    Metric("val/SET/empathy/*", "higher"),
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

    Speed and counts are left out: their last value is the one that counts. So is what W&B's patterns cannot express.
    """
    quality = [m for m in METRICS if m.better and m.key.startswith(("train/", "val/"))]
    return {key: "min" if metric.better == "lower" else "max" for metric in quality for key in metric.expanded(sets)}
