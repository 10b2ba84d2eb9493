"""A study as its file has it: a base experiment in stages, and variants that are only their differences from it.

    base: shared.yaml                      # optional: another file, which this one overlays
    vars: {out: runs/ablations/example, corpus: runs/quickstart, steps: 100}
    seeds: [0, 1, 2]
    stages:                                # in order; each starts from the one before it
      - name: understanding
        command: [fit, --config, experiments/understanding.yaml, --trainer.max_steps, "${vars.steps}"]
      - name: evaluation
        command: [evaluate, --sets, "[{name: held-out, shards: ['${vars.corpus}/corpus/held_out_voices']}]"]
    variants:
      base: {}
      small rate: {understanding: {model.init_args.optimizer.init_args.lr: 1.0e-5}}
      without: {understanding: skip}
    figures: {WER: {path: understanding.wer, better: lower}, emotion: {path: empathy.emotion.0}}
    reference: {source: who measured it, values: {base: {emotion: 58.0}}}

A stage's command is `fit` or `evaluate`; where it writes, what it starts from and its seed are added to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_echat.contracts import UserError
from lightning_echat.recipes.recipe_file import fill, fill_variables, refuse_unknown

_STUDY_KEYS = ("base", "title", "vars", "seeds", "stages", "variants", "figures", "compare_to", "reference", "notes")
_REQUIRED = ("vars", "seeds", "stages", "variants", "figures")
SKIP = "skip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the base experiment.

    Attributes:
        name: How variants and folders call it.
        command: Words of `echat fit …` or `echat evaluate …`.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What differs from the base.

    Attributes:
        name: How tables call it.
        skipped: Stages that it leaves out.
        options: Stage -> words that come after the stage's own.
    """

    name: str
    skipped: frozenset[str]
    options: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number of the table.

    Attributes:
        name: Head of its column.
        path: Where it stands in the last stage's `report.json`: keys and places in lists, with dots between.
        better: Which way is better.
        digits: After the point.
    """

    name: str
    path: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Numbers of others, to stand beside ours.

    Attributes:
        source: Who measured them, on what.
        values: Variant -> figure -> number.
    """

    source: str
    values: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study, checked and filled in."""

    path: Path
    title: str
    out: Path
    seeds: tuple[int, ...]
    stages: tuple[Stage, ...]
    variants: tuple[Variant, ...]
    figures: tuple[Figure, ...]
    compare_to: str
    reference: Reference | None
    notes: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


def load_study(path: Path, overrides: Sequence[str] = (), seeds: Sequence[int] = ()) -> Study:
    """Read a study.

    Args:
        path: YAML file.
        overrides: KEY=VALUE pairs that replace variables.
        seeds: Instead of the file's.

    Raises:
        UserError: The study or an override is wrong.
    """
    if not path.is_file():
        raise UserError(f"no study {str(path)!r}")
    content = _content(path)
    if missing := [key for key in _REQUIRED if not content.get(key)]:
        raise UserError(f"{path}: {missing[0]} is missing; a study holds {', '.join(_REQUIRED)}")
    variables = fill_variables(content["vars"], overrides, path)
    stages = tuple(_stage(entry, variables, path) for entry in content["stages"])
    variants = tuple(
        _variant(name, changes or {}, stages, variables, path) for name, changes in content["variants"].items()
    )
    figures = tuple(_figure(name, entry, path) for name, entry in content["figures"].items())
    compare_to = content.get("compare_to", variants[0].name)
    if compare_to not in [variant.name for variant in variants]:
        raise UserError(f"{path}: compare_to {compare_to!r} is no variant")
    return Study(
        path=path,
        title=content.get("title", path.stem),
        out=Path(variables["out"]),
        seeds=_seeds(seeds or content["seeds"], path),
        stages=stages,
        variants=variants,
        figures=figures,
        compare_to=compare_to,
        reference=_reference(content.get("reference"), variants, figures, path),
        notes=str(content.get("notes", "")).strip(),
        variables=variables,
    )


def _content(path: Path) -> dict[str, Any]:
    """What a file says, on top of what the file under `base` says: variables one by one, everything else as a whole."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: a study holds {', '.join(_REQUIRED)}, of its own or in the file under base")
    refuse_unknown(content, _STUDY_KEYS, f"{path}:")
    if (base := content.pop("base", None)) is None:
        return content
    # A path as in commands: from the folder where the study is run; or beside the study.
    found = next((file for file in (Path(str(base)), path.parent / str(base)) if file.is_file()), None)
    if found is None:
        raise UserError(f"{path}: base {str(base)!r} is no file")
    below = _content(found)
    return {**below, **content, "vars": {**(below.get("vars") or {}), **(content.get("vars") or {})}}


def _seeds(given: Any, path: Path) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not all(type(seed) is int and seed >= 0 for seed in given):
        raise UserError(f"{path}: seeds are whole numbers, as in seeds: [0, 1, 2], not {given!r}")
    if len(set(given)) < len(given):
        raise UserError(f"{path}: seeds {given!r} repeat one; the same run twice says nothing new")
    return tuple(given)


def _stage(entry: Any, variables: Mapping[str, str], path: Path) -> Stage:
    if not isinstance(entry, dict) or not entry.get("name") or not isinstance(entry.get("command"), list):
        raise UserError(f"{path}: every stage has a name and a command (a list of words), not {entry!r}")
    where = f"{path}: stage {entry['name']!r}"
    refuse_unknown(entry, ("name", "command"), f"{where}:")
    command = tuple(fill(_word(word), variables, where) for word in entry["command"])
    return Stage(name=entry["name"], command=command)


def _variant(name: str, changes: Any, stages: Sequence[Stage], variables: Mapping[str, str], path: Path) -> Variant:
    where = f"{path}: variant {name!r}"
    if not isinstance(changes, dict):
        raise UserError(f"{where}: give its differences by stage, as in {{{stages[0].name}: {{option: value}}}}")
    refuse_unknown(changes, [stage.name for stage in stages], f"{where}:")
    options: dict[str, tuple[str, ...]] = {}
    for stage, entry in changes.items():
        if entry == SKIP:
            continue
        if not isinstance(entry, dict):
            raise UserError(f"{where}, {stage}: give {SKIP!r} or options and their values, not {entry!r}")
        options[stage] = tuple(f"--{option}={fill(_word(value), variables, where)}" for option, value in entry.items())
    skipped = frozenset(stage for stage, entry in changes.items() if entry == SKIP)
    if stages[-1].name in skipped:
        raise UserError(f"{where}: the last stage, {stages[-1].name!r}, makes the figures and cannot be skipped")
    return Variant(name=name, skipped=skipped, options=options)


def _word(value: Any) -> str:
    """A value as a word of a command: what is not a plain text as JSON, which every parser here reads."""
    return value if isinstance(value, str) else json.dumps(value)


def _figure(name: str, entry: Any, path: Path) -> Figure:
    where = f"{path}: figure {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f"{where}: give {{path: part.of.report, better: higher or lower}}")
    refuse_unknown(entry, ("path", "better", "digits"), f"{where}:")
    if entry.get("better", "higher") not in ("higher", "lower"):
        raise UserError(f"{where}: better is higher or lower, not {entry['better']!r}")
    return Figure(name=name, **entry)


def _reference(entry: Any, variants: Sequence[Variant], figures: Sequence[Figure], path: Path) -> Reference | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or not entry.get("source") or not isinstance(entry.get("values"), dict):
        raise UserError(f"{path}: a reference has a source and values, variant by variant")
    refuse_unknown(entry["values"], [variant.name for variant in variants], f"{path}: reference:")
    for name, values in entry["values"].items():
        refuse_unknown(values, [figure.name for figure in figures], f"{path}: reference, {name!r}:")
    return Reference(source=entry["source"], values=entry["values"])
