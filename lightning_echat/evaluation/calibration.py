"""Calibration: whether a model is right as often as it is sure.

The confidence of an answer is the probability of its likeliest label. Answers are sorted into bins of equal width by
confidence; the expected calibration error is the mean distance of accuracy and confidence of the bins, weighted by how
many answers each holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 10


def calibration(probabilities: Sequence[Mapping[str, float]], truths: Sequence[str]) -> dict[str, Any]:
    """ECE, accuracy, mean confidence and the reliability table of one label set.

    Args:
        probabilities: Label -> probability, for each answer.
        truths: The true label of each.

    Returns:
        `items`, `ece`, `accuracy`, `confidence` and `reliability` (bins that hold answers: `low`, `high`, `items`,
        `confidence`, `accuracy`). Rates are NaN without items.
    """
    if not truths:
        nan = float("nan")
        return {"items": 0, "ece": nan, "accuracy": nan, "confidence": nan, "reliability": []}
    best = [max(found, key=lambda label: found[label]) for found in probabilities]
    confidence = np.array([found[label] for found, label in zip(probabilities, best, strict=True)])
    right = np.array([label == truth for label, truth in zip(best, truths, strict=True)], dtype=float)
    # Bins are open below, so that a confidence of 1 has one, and 0 does not occur with two labels or more.
    places = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    table = []
    for place in range(BINS):
        inside = places == place
        if inside.any():
            table.append(
                {
                    "low": place / BINS,
                    "high": (place + 1) / BINS,
                    "items": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    ece = sum(row["items"] * abs(row["confidence"] - row["accuracy"]) for row in table) / len(truths)
    return {
        "items": len(truths),
        "ece": float(ece),
        "accuracy": float(right.mean()),
        "confidence": float(confidence.mean()),
        "reliability": table,
    }
