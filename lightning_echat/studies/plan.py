"""From a study to its runs: which stage is trained with what, and which variants share it.

A stage's folder is named after everything that decides its result: the settings that its words resolve to, its seed,
and the stage it starts from. Variants that agree on all of it name the same folder, and it is trained once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_echat.contracts import UserError
from lightning_echat.recipes.fingerprints import hash_of
from lightning_echat.recipes.recipe_file import Recipe, Step
from lightning_echat.studies.study_file import Stage, Study, Variant

Resolve = Callable[[list[str]], Any]
"""Words of a command -> all its settings, defaults included; raises what a user can mend."""

_STANDS_FOR_A_FOLDER = "FOLDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """The options by which a command is told where it stands in a study.

    Attributes:
        folder: What it writes into.
        start: The stage before.
        seeds: Its seed.
        output: What its folder holds once it has succeeded.
        always: Further words.
        resumes: Whether its folder is what an interrupted run continues from.
    """

    folder: str
    start: str
    seeds: tuple[str, ...]
    output: str
    always: tuple[str, ...] = ()


_PLACES = {
    "fit": _Places(
        folder="--trainer.default_root_dir",
        start="--model.init_args.init_from",
        seeds=("--seed_everything", "--data.init_args.seed"),
        output="checkpoints/last.ckpt",
        always=("--ckpt_path", "last"),
    ),
    # Its seed is that of the bootstrap intervals, which no figure of a study depends on.
    "evaluate": _Places(folder="--out", start="--checkpoint", seeds=(), output="report.json"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One variant with one seed.

    Attributes:
        variant, seed: Which.
        steps: Stage -> name of the step that makes it, in order.
    """

    variant: str
    seed: int
    steps: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study runs.

    Attributes:
        recipe: Every stage that is trained, once.
        runs: What stands on them.
    """

    recipe: Recipe
    runs: tuple[PlannedRun, ...]

    def folder(self, step: str) -> Path:
        """Where a step writes."""
        return self.recipe.out / "stages" / step

    def users(self, step: str) -> list[PlannedRun]:
        """The runs that stand on a step."""
        return [run for run in self.runs if step in run.steps.values()]


def plan_study(study: Study, *, resolve: Resolve) -> Plan:
    """Plan every run, having checked every command with its own parser.

    Args:
        study: What to plan.
        resolve: Parses a command without running it.

    Raises:
        UserError: A command cannot be what it is meant to be; what `resolve` raises.
    """
    steps: dict[str, Step] = {}
    resolved: dict[tuple[str, ...], str] = {}
    runs: list[PlannedRun] = []
    # By seed first: with few processes, whole comparisons come early.
    for seed in study.seeds:
        for variant in study.variants:
            made: dict[str, str] = {}
            for stage in study.stages:
                if stage.name in variant.skipped:
                    continue
                before = next(reversed(made.values()), None)
                step = _step(study, variant, stage, seed=seed, before=before, resolve=resolve, resolved=resolved)
                steps.setdefault(step.name, step)
                made[stage.name] = step.name
            runs.append(PlannedRun(variant=variant.name, seed=seed, steps=made))
    order = {stage.name: place for place, stage in enumerate(study.stages)}
    by_stage = sorted(steps.values(), key=lambda step: order[step.name.rpartition("-")[0]])
    return Plan(recipe=Recipe(out=study.out, steps=tuple(by_stage)), runs=tuple(runs))


def _step(
    study: Study,
    variant: Variant,
    stage: Stage,
    *,
    seed: int,
    before: str | None,
    resolve: Resolve,
    resolved: dict[tuple[str, ...], str],
) -> Step:
    where = f"{study.path}: variant {variant.name!r}, stage {stage.name!r}"
    places = _PLACES.get(stage.command[0])
    if places is None:
        raise UserError(f"{where}: a stage's command is {' or '.join(_PLACES)}, not {stage.command[0]!r}")
    if before is None and stage is study.stages[-1]:
        raise UserError(f"{where}: nothing was trained before it")
    words = (*stage.command, *variant.options.get(stage.name, ()))
    start = (f"{places.start}={_STANDS_FOR_A_FOLDER}",) if before else ()
    asked = (*words, *start, f"{places.folder}={_STANDS_FOR_A_FOLDER}")
    if asked not in resolved:
        try:
            resolved[asked] = json.dumps(resolve(list(asked)), sort_keys=True, default=str)
        except Exception as error:
            error.args = (f"{where}: {error}",)
            raise
    name = f"{stage.name}-{hash_of([resolved[asked], str(seed), before or ''])[:10]}"
    folder = study.out / "stages" / name
    origin = (f"{places.start}={study.out / 'stages' / before}",) if before else ()
    seeds = tuple(f"{option}={seed}" for option in places.seeds)
    return Step(
        name=name,
        command=(*words, *seeds, *origin, f"{places.folder}={folder}", *places.always),
        outputs=(folder / places.output,),
        resumable_folder=folder,
    )
