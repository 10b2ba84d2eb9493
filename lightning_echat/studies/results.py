"""What the runs of a study have come to: a figure's mean over seeds with its interval, and differences seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lightning_echat.recipes.step_run import read_state
from lightning_echat.studies.plan import Plan, PlannedRun
from lightning_echat.studies.run_steps import Progress
from lightning_echat.studies.study_file import Figure, Study


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What one run has come to.

    Attributes:
        variant, seed: Which.
        steps: Stage -> step.
        figures: Name -> value; NaN where the report has none, as for the accuracy of a thinking that is not there.
        seconds: Of all its stages, shared ones counted in full: what it would take alone.
        trained_steps: Optimizer steps of all its stages.
        failure: Why it has no figures; empty where it has.
    """

    variant: str
    seed: int
    steps: dict[str, str]
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = math.nan
    trained_steps: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds with half the width of its 95 % t interval, NaN where one seed leaves it unknown."""

    mean: float
    half_width: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval of what is not NaN."""
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if known.size == 0:
        return Estimate(mean=math.nan, half_width=math.nan, n=0)
    if known.size == 1:
        return Estimate(mean=float(known[0]), half_width=math.nan, n=1)
    spread = float(known.std(ddof=1)) / math.sqrt(known.size)
    width = float(stats.t.ppf(0.975, known.size - 1)) * spread
    return Estimate(mean=float(known.mean()), half_width=width, n=int(known.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResults:
    """All runs of a study, finished or not.

    Attributes:
        study: Its file.
        runs: A result each.
        seconds_spent: Of every step, shared ones counted once.
    """

    study: Study
    runs: tuple[RunResult, ...]
    seconds_spent: float

    def values(self, variant: str, figure: str) -> dict[int, float]:
        """Seed -> value, of the runs that have come to an end."""
        return {run.seed: run.figures[figure] for run in self.runs if run.variant == variant and not run.failure}

    def estimate(self, variant: str, figure: str) -> Estimate:
        """Over seeds."""
        return estimate(list(self.values(variant, figure).values()))

    def difference(self, variant: str, figure: str) -> Estimate:
        """Of a variant from the one that all are compared to, seed by seed: what a seed does to both cancels."""
        ours, theirs = self.values(variant, figure), self.values(self.study.compare_to, figure)
        return estimate([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def cost(self, variant: str) -> tuple[float, float]:
        """Mean seconds and mean optimizer steps of a run."""
        ended = [run for run in self.runs if run.variant == variant and not run.failure]
        if not ended:
            return math.nan, math.nan
        return float(np.mean([run.seconds for run in ended])), float(np.mean([run.trained_steps for run in ended]))

    @property
    def failed(self) -> list[RunResult]:
        """The runs that have no figures."""
        return [run for run in self.runs if run.failure]


def collect(study: Study, plan: Plan, progress: Mapping[str, Progress]) -> StudyResults:
    """Read what every run has left."""
    runs = tuple(_result(study, plan, run, progress) for run in plan.runs)
    states = [read_state(plan.recipe.out, step.name) for step in plan.recipe.steps]
    return StudyResults(study=study, runs=runs, seconds_spent=sum(state.seconds for state in states if state))


def _result(study: Study, plan: Plan, run: PlannedRun, progress: Mapping[str, Progress]) -> RunResult:
    unfinished = {stage: step for stage, step in run.steps.items() if progress[step].status not in ("done", "reused")}
    if unfinished:
        first = next(iter(unfinished.values()))
        reason = f"{first} {progress[first].status}" + (
            f" ({progress[first].reason})" if progress[first].reason else ""
        )
        return RunResult(variant=run.variant, seed=run.seed, steps=run.steps, failure=reason)
    last = list(run.steps.values())[-1]
    report = json.loads((plan.folder(last) / "report.json").read_text(encoding="utf-8"))
    states = [read_state(plan.recipe.out, step) for step in run.steps.values()]
    return RunResult(
        variant=run.variant,
        seed=run.seed,
        steps=run.steps,
        figures={figure.name: figure_in(report, figure) for figure in study.figures},
        seconds=sum(state.seconds for state in states if state),
        trained_steps=sum(_trained_steps(plan.folder(step)) for step in run.steps.values()),
    )


def figure_in(report: Mapping[str, Any], figure: Figure) -> float:
    """The value at a figure's path; NaN where the report ends before it or holds null."""
    value: Any = report
    for part in figure.path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _trained_steps(folder: Path) -> int:
    file = folder / "stage_summary.json"
    return int(json.loads(file.read_text(encoding="utf-8")).get("steps") or 0) if file.is_file() else 0


def as_json(results: StudyResults) -> dict[str, Any]:
    """Everything, as plain values; what has no data is null."""
    return {
        "title": results.study.title,
        "file": str(results.study.path),
        "seconds_spent": round(results.seconds_spent, 1),
        "variables": dict(results.study.variables),
        "runs": [_without_nan(asdict(run)) for run in results.runs],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
