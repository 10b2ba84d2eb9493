"""Which parameters of a sweep mattered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_echat.studies.search import Trial

FEWEST_TRIALS = 8
"""With fewer, a forest fits noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """What the trials tell about each parameter.

    Attributes:
        explained: Share of the metric's variance that a random forest predicts for trials it has not seen (out of bag).
            At or below 0 the trials do not tell which parameters mattered, whatever `shares` say.
        shares: Parameter -> permutation importance in that forest, as shares of 1.
        correlation: Parameter -> Spearman's rank correlation with the metric; absent for one that is not a number.
        trials: How many were used.
    """

    explained: float
    shares: dict[str, float]
    correlation: dict[str, float]
    trials: int


def importance(trials: Sequence[Trial], parameters: Sequence[str]) -> Importance | None:
    """See `Importance`; None where too few trials have a value.

    Trials that were stopped early count with the best value that they had reached, which is worse than they would have
    become; failed ones do not count.
    """
    from scipy.stats import spearmanr
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    used = [trial for trial in trials if trial.best is not None and trial.state != "failed"]
    varied = [name for name in parameters if len({str(trial.parameters.get(name)) for trial in used}) > 1]
    values = np.asarray([trial.best for trial in used], dtype=np.float64)
    if len(used) < FEWEST_TRIALS or not varied or np.ptp(values) == 0:
        return None
    columns = {name: as_numbers([trial.parameters.get(name) for trial in used]) for name in varied}
    features = np.column_stack([columns[name] for name in varied])
    forest = RandomForestRegressor(n_estimators=300, oob_score=True, random_state=0).fit(features, values)
    found = permutation_importance(forest, features, values, n_repeats=20, random_state=0)
    means = np.clip(np.asarray(found["importances_mean"], dtype=np.float64), 0.0, None)
    total = means.sum()
    return Importance(
        explained=float(forest.oob_score_),
        shares={name: float(mean / total) if total else math.nan for name, mean in zip(varied, means, strict=True)},
        correlation={
            name: float(np.asarray(spearmanr(columns[name], values))[0])
            for name in varied
            if all(_is_number(trial.parameters.get(name)) for trial in used)
        },
        trials=len(used),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_numbers(values: Sequence[Any]) -> np.ndarray:
    """Numbers as they are; anything else as its place among the different values. A forest only asks for the order."""
    if all(_is_number(value) for value in values):
        return np.asarray(values, dtype=np.float64)
    names = sorted({str(value) for value in values})
    return np.asarray([names.index(str(value)) for value in values], dtype=np.float64)


def summary(found: Importance | None, ends: Mapping[str, str]) -> list[str]:
    """Lines of Markdown."""
    if found is None:
        return [f"Fewer than {FEWEST_TRIALS} trials with different values: which parameters mattered cannot be said."]
    lines = [
        f"A random forest over {found.trials} trials predicts {found.explained:.0%} of the variance of trials that it "
        "has not seen"
        + (". " if found.explained > 0 else ", so the trials do not tell which parameters mattered. ")
        + "Permutation importance, and Spearman's rank correlation with the metric:",
        "",
        "| parameter | importance | correlation |",
        "| --- | --- | --- |",
    ]
    for name, share in sorted(found.shares.items(), key=lambda entry: -entry[1]):
        sign = found.correlation.get(name)
        lines.append(f"| {ends[name]} | {share:.2f} | {'–' if sign is None or math.isnan(sign) else f'{sign:+.2f}'} |")
    return lines
