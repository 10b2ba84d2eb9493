"""One table of metrics: what the README lists, what W&B keeps, and what trainings log are the same."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_echat.evaluation.items import CATEGORIES
from lightning_echat.tracking.metric_table import METRICS, STANDS_FOR, best_values, metric_of

ROOT = Path(__file__).parents[3]


def readme_rows() -> dict[str, str]:
    """Key -> direction, as the README's table has them."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Metrics")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {key: row[-1].strip() for row in rows for key in re.findall(r"`([^`]+)`", row[0])}


def test_the_readme_lists_every_metric_with_its_direction():
    assert readme_rows() == {metric.key: metric.better or "–" for metric in METRICS}


def test_a_key_finds_its_row():
    assert metric_of("val/dialogue/wer").better == "lower"
    assert metric_of("val/dialogue/accuracy/emotion").better == "higher"
    assert metric_of("val/dialogue/empathy/count").better == ""
    assert metric_of("val/dialogue/empathy/mean").better == "higher"
    assert metric_of("data/skipped/no_turns").better == "lower"
    assert metric_of("val/dialogue/accuracy/mood") is None
    assert metric_of("val/a/b/wer") is None


def test_the_categories_are_those_of_the_benchmark():
    assert STANDS_FOR["CATEGORY"] == (*CATEGORIES, "mean")


def test_the_best_value_is_the_least_or_the_greatest():
    best = best_values(["talk"])
    assert best["train/loss"] == best["val/talk/wer"] == "min"
    assert best["val/talk/macro_f1/age"] == best["val/talk/empathy/mean"] == "max"
    # What nobody wants less or more of, and speed, whose last value counts.
    assert not [key for key in best if key.startswith(("perf", "data")) or "majority" in key or "count" in key]
