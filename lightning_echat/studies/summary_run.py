"""A study's table as a W&B run."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lightning_echat.studies.results import StudyResults
from lightning_echat.tracking.defaults import set_wandb_defaults


def log_summary(results: StudyResults, out: Path) -> None:
    """One run that holds the means, the table of all runs and the drawing; offline unless WANDB_MODE says otherwise."""
    set_wandb_defaults()
    os.environ.setdefault("WANDB_DATA_DIR", str(out.absolute() / ".wandb-data"))
    import wandb

    if os.environ["WANDB_MODE"] == "disabled":
        return
    study = results.study
    columns: list[str | int] = [
        "variant",
        "seed",
        *(figure.name for figure in study.figures),
        "seconds",
        "steps",
        "failure",
    ]
    rows = [
        [
            run.variant,
            run.seed,
            *(_or_none(run.figures.get(figure.name, math.nan)) for figure in study.figures),
            _or_none(run.seconds),
            run.trained_steps,
            run.failure,
        ]
        for run in results.runs
    ]
    with wandb.init(
        project="lightning-echat",
        name=study.title,
        group=study.title,
        job_type="ablation",
        dir=out.absolute(),  # W        dir=out,B's service may stand in another folder
        config={"study": str(study.path), "seeds": list(study.seeds), "variables": dict(study.variables)},
    ) as run:
        means: dict[str, float | None] = {}
        for variant in study.variants:
            for figure in study.figures:
                found = results.estimate(variant.name, figure.name)
                means[f"{figure.name}/{variant.name}"] = _or_none(found.mean)
                means[f"{figure.name}/{variant.name}/half_width"] = _or_none(found.half_width)
        table = wandb.Table(columns=columns, data=rows)
        run.log({**means, "runs": table, "plot": wandb.Image(str(out / "results.png"))})


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
