"""Recipes: `echat` commands in order, each reused while nothing that it depends on has changed.

    vars:
      out: runs/example                     # the run's folder; state is kept in its .recipe/
      budget: short
      steps: {by: budget, short: 100, long: 900}
    steps:
      - name: corpus
        command: [data, synthesize, --out, "${vars.out}/corpus"]
        outputs: ["${vars.out}/corpus"]
      - name: understanding
        command: [fit, --config, experiments/understanding.yaml, --trainer.max_steps, "${vars.steps}"]
        inputs: ["${vars.out}/corpus"]
        outputs: ["${vars.out}/understanding/checkpoints/last.ckpt"]
        resumable_folder: "${vars.out}/understanding"

A step is reused when its fingerprint is the stored one and its outputs exist. The fingerprint covers the command, the
content of the files that the command or `inputs` name, the fingerprints of the steps that make its inputs, the
source of this project and the versions of what it computes with. So any edit of the source runs every step again: a
figure in the report never comes from older code.

`resumable_folder` is what an interrupted step continues from. It is kept when the interrupted run had the same
fingerprint, and moved to FOLDER.stale otherwise, so that a run never resumes from other settings.

Steps run in processes of their own, forked from one that has imported the heavy libraries once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.contracts import UserError

_STEP_KEYS = ("name", "command", "inputs", "outputs", "resumable_folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a recipe.

    Attributes:
        name: How state, `--only` and messages call it.
        command: Arguments of `echat`.
        inputs: Files and folders it reads, made by earlier steps or by the user.
        outputs: Files and folders that exist once it has succeeded.
        resumable_folder: What an interrupted run of it continues from.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    resumable_folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Steps, and the folder of the run."""

    out: Path
    steps: tuple[Step, ...]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and fill in its variables.

    Args:
        path: YAML file.
        overrides: KEY=VALUE pairs that replace variables.

    Raises:
        UserError: The recipe or an override is wrong.
    """
    if not path.is_file():
        raise UserError(f"no recipe {str(path)!r}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise UserError(f"{path}: a recipe holds vars and a list of steps")
    refuse_unknown(content, ("vars", "steps"), f"{path}:")
    variables = fill_variables(content.get("vars") or {}, overrides, path)
    steps = tuple(read_step(entry, variables, path) for entry in content["steps"])
    names = [step.name for step in steps]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: two steps are called {repeated!r}")
    return Recipe(out=Path(variables["out"]), steps=steps)


def fill_variables(given: Mapping[str, Any], overrides: Sequence[str], path: Path) -> dict[str, str]:
    """The variables of a file, each with those above it filled in, choices made, and KEY=VALUE pairs taken over."""
    values = dict(given)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: give KEY=VALUE")
        refuse_unknown({name: value}, list(values), f"--set {override}: {path} has variables {', '.join(values)};")
        values[name] = value
    if "out" not in values:
        raise UserError(f"{path}: vars.out is missing, the folder of the run")
    filled: dict[str, str] = {}
    for name, value in values.items():
        # A variable may use those above it, so there are no circles.
        where = f"{path}: vars.{name}"
        filled[name] = fill(_choose(value, filled, where) if isinstance(value, dict) else _text(value), filled, where)
    return filled


def _choose(choices: Mapping[str, Any], variables: Mapping[str, str], where: str) -> str:
    """{by: budget, short: 100, long: 900} -> 900, where budget is long."""
    by = str(choices.get("by", ""))
    if by not in variables:
        raise UserError(f"{where}: a choice names the variable above it that decides, as in {{by: budget, short: 1}}")
    known = [str(name) for name in choices if name != "by"]
    if variables[by] not in known:
        raise UserError(f"{by}={variables[by]}: {where} knows {', '.join(known)}")
    return _text({str(name): value for name, value in choices.items()}[variables[by]])


def read_step(entry: Any, variables: Mapping[str, str], path: Path) -> Step:
    """An entry under `steps`, checked and filled in."""
    if not isinstance(entry, dict) or not entry.get("name") or not isinstance(entry.get("command"), list):
        raise UserError(f"{path}: every step has a name and a command (a list of words), not {entry!r}")
    where = f"{path}: step {entry['name']!r}"
    refuse_unknown(entry, _STEP_KEYS, f"{where}:")
    if not re.fullmatch(r"[\w-]+", entry["name"]):
        raise UserError(f"{where}: a name is letters, digits, - and _")

    def filled(key: str) -> list[str]:
        return [fill(_text(word), variables, f"{where}, {key}") for word in entry.get(key) or []]

    folder = entry.get("resumable_folder")
    return Step(
        name=entry["name"],
        command=tuple(filled("command")),
        inputs=tuple(map(Path, filled("inputs"))),
        outputs=tuple(map(Path, filled("outputs"))),
        resumable_folder=Path(fill(folder, variables, where)) if folder else None,
    )


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise `UserError` for a key that nobody reads, naming the nearest that somebody does."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(f"{where} unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def fill(text: str, variables: Mapping[str, str], where: str) -> str:
    """`text` with every `${vars.NAME}` replaced."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in variables:
            raise UserError(f"{where}: no variable {match[1]!r}; there are {', '.join(variables) or 'none above it'}")
        return variables[match[1]]

    return re.sub(r"\$\{vars\.(\w+)\}", value, text)
