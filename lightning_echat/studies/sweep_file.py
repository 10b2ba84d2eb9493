"""A W&B sweep file, and what is wrong with it before anything has been trained.

The file is W&B's own (https://docs.wandb.ai/guides/sweeps): `wandb sweep` takes it as it is. What is asked of it beyond
that: `program: echat`, a command that names an experiment, and parameters under flat dotted names, so that every one
can be checked against the parser of the command.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_echat.contracts import UserError
from lightning_echat.studies.search import schema_violations
from lightning_echat.tracking.metric_table import METRICS, metric_of

Resolve = Callable[[list[str]], Any]
"""Words of a command -> all its settings, defaults included; raises what a user can mend."""

_MACROS = ("${args}", "${args_no_equals}", "${args_json_file}")
_BETTER = {"minimize": "lower", "maximize": "higher"}
_EXPONENTS = ("log_uniform", "q_log_uniform", "inv_log_uniform")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFile:
    """A sweep as its file has it.

    Attributes:
        path: The file.
        content: Its YAML, as W&B's search engine takes it.
        metric: Name of what is optimized; empty where a grid or random search names none.
        goal: "minimize" or "maximize".
    """

    path: Path
    content: dict[str, Any]
    metric: str
    goal: str

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """Name -> distribution."""
        return self.content["parameters"]

    @property
    def stops_early(self) -> bool:
        """Whether trials may be stopped before their end."""
        return "early_terminate" in self.content

    def words(self, values: Mapping[str, Any], values_file: Path) -> list[str]:
        """What a trial gives `echat`, as `wandb agent` would word it.

        Args:
            values: Of the parameters.
            values_file: A JSON file that holds them.
        """
        macros = {
            "${args}": [f"--{name}={value}" for name, value in values.items()],
            "${args_no_equals}": [word for name, value in values.items() for word in (f"--{name}", str(value))],
            "${args_json_file}": [str(values_file)],
        }
        words: list[str] = []
        for word in map(str, self.content["command"]):
            filled = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda match: os.environ.get(match[1], match[1]), word)
            words += macros.get(word, [filled])
        return words[_start_of_arguments(words) :]


def _start_of_arguments(words: Sequence[str]) -> int:
    """Where the words that `echat` gets begin."""
    for place, word in enumerate(words):
        if word == "${program}" or Path(word).name == "echat":
            return place + 1
    return 0


def load_sweep(path: Path) -> SweepFile:
    """Read a sweep file and check what needs no parser.

    Raises:
        UserError: It is no sweep file, or not one that `echat` can run.
    """
    if not path.is_file():
        raise UserError(f"no sweep file {str(path)!r}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: a sweep file holds program, command, method, metric and parameters")
    for key in ("program", "command", "method", "parameters"):
        if not content.get(key):
            raise UserError(f"{path}: {key} is missing")
    _check_command(path, content)
    for name, distribution in content["parameters"].items():
        _check_range(f"{path}: parameter {name!r}", distribution)
    metric = content.get("metric") or {}
    if not isinstance(metric, dict):
        raise UserError(f"{path}: metric: give {{name: val/…, goal: minimize or maximize}}, not {metric!r}")
    if violations := schema_violations(content):
        raise UserError(f"{path}: {violations[0]}")
    if not metric.get("name") and (content["method"] == "bayes" or "early_terminate" in content):
        raise UserError(f"{path}: metric is missing; bayes and early_terminate need {{name: val/…, goal: minimize}}")
    if metric and metric.get("goal") not in ("minimize", "maximize"):
        raise UserError(f"{path}: metric: goal is minimize or maximize, not {metric.get('goal')!r}")
    return SweepFile(path=path, content=content, metric=metric.get("name", ""), goal=metric.get("goal", "minimize"))


def _check_command(path: Path, content: Mapping[str, Any]) -> None:
    command = content["command"]
    if not isinstance(command, list):
        raise UserError(f"{path}: command is a list of words")
    words = [str(word) for word in command]
    runs_echat = "${program}" in words and Path(str(content["program"])).name == "echat"
    if not runs_echat and not any(Path(word).name == "echat" for word in words):
        raise UserError(f'{path}: give program: echat and command: ["${{env}}", "${{program}}", fit, --config, …]')
    if words[_start_of_arguments(words)] != "fit":
        raise UserError(f"{path}: a sweep trains: the command of echat is fit")
    if not any(word in _MACROS for word in words):
        raise UserError(f"{path}: command holds none of {', '.join(_MACROS)}: no trial would get its parameters")


def _check_range(where: str, distribution: Any) -> None:
    """Refuse what can be read in two ways."""
    if not isinstance(distribution, dict):
        raise UserError(f"{where}: give values: […], or a distribution with min and max, not {distribution!r}")
    if "parameters" in distribution:
        raise UserError(f"{where}: nested parameters lock the whole key in W&B; give flat names with dots")
    low, high = distribution.get("min"), distribution.get("max")
    kind = distribution.get("distribution")
    if low is None or high is None:
        return
    # What YAML takes for a text (1e-5, for it wants 1.0e-5) never is a number for the engine.
    for name, value in (("min", low), ("max", high)):
        if isinstance(value, str):
            raise UserError(f"{where}: {name} {value!r} is a text to YAML; write it with a point, as in 1.0e-5")
    if isinstance(low, bool) or isinstance(high, bool) or not isinstance(low + high, int | float):
        raise UserError(f"{where}: min and max are numbers")
    if low >= high:
        raise UserError(f"{where}: min {low} is not below max {high}")
    if kind is None and type(low) is not type(high):
        raise UserError(
            f"{where}: min {low} and max {high}, one whole and one not: ambiguous; "
            f"write {float(low)} and {float(high)}, or distribution: int_uniform"
        )
    if kind in _EXPONENTS and 0 < low < high <= 1:
        raise UserError(
            f"{where}: {kind} takes exponents, so this means {math.exp(low):.3g} to {math.exp(high):.3g}; "
            f"for values from {low:g} to {high:g} write {kind}_values"
        )


def check_with_parser(sweep: SweepFile, *, resolve: Resolve, scratch: Path) -> dict[str, Any]:
    """Check every parameter against the parser of the command, and the metric against the validation sets.

    Costs a parse for each value of the parameter that has most, and one for each range of whole numbers.

    Args:
        sweep: What to check.
        resolve: Parses a command without running it.
        scratch: Folder for the file that holds values.

    Returns:
        The settings of the experiment with the first value of every parameter.

    Raises:
        UserError: A path that the command does not know, a value of the wrong type, an ambiguous range, a metric that
            nothing logs.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / "checked.json"

    def parse(values: Mapping[str, Any]) -> Any:
        file.write_text(json.dumps(values), encoding="utf-8")
        return resolve(sweep.words(values, file))

    try:
        candidates = {name: _candidates(distribution) for name, distribution in sweep.parameters.items()}
        settings: Any = None
        for place in reversed(range(max(map(len, candidates.values())))):
            values = {name: options[min(place, len(options) - 1)] for name, options in candidates.items()}
            try:
                settings = parse(values)
            except Exception as error:
                # The parser read the values from a file that nobody else ever sees.
                error.args = (f"{sweep.path}: {str(error).replace(f' ({file} line 1)', '')}",)
                raise
        first = {name: options[0] for name, options in candidates.items()}
        for name, distribution in sweep.parameters.items():
            if _is_whole_range(distribution) and _parses(parse, {**first, name: distribution["min"] + 0.5}):
                raise UserError(
                    f"{sweep.path}: parameter {name!r}: min {distribution['min']} and max {distribution['max']} are "
                    f"whole, but {name} may be any number: ambiguous; write {float(distribution['min'])} and "
                    f"{float(distribution['max'])}, or distribution: int_uniform"
                )
    finally:
        file.unlink(missing_ok=True)
    if isinstance(settings, dict):
        _check_metric(sweep, settings)
    return settings


def _candidates(distribution: Mapping[str, Any]) -> list[Any]:
    """Values that a parameter may take: all that are listed, or the ends of a range."""
    if "values" in distribution:
        return list(distribution["values"])
    if "value" in distribution:
        return [distribution["value"]]
    kind, low, high = distribution.get("distribution"), distribution.get("min"), distribution.get("max")
    if low is None or high is None:
        # normal and its kin, around mu.
        centre = float(distribution.get("mu", 0))
        return [math.exp(centre) if "log" in str(kind) else centre]
    if kind in _EXPONENTS:
        return [math.exp(low), math.exp(high)]
    return [low, high] if _is_whole_range(distribution) or kind == "int_uniform" else [float(low), float(high)]


def _is_whole_range(distribution: Mapping[str, Any]) -> bool:
    """A range of whole numbers that does not say that it means them."""
    ends = (distribution.get("min"), distribution.get("max"))
    return "distribution" not in distribution and all(type(end) is int for end in ends)


def _parses(parse: Callable[[Mapping[str, Any]], Any], values: Mapping[str, Any]) -> bool:
    try:
        parse(values)
    except Exception:  # whatever the parser has against the value, it is no number of that kind
        return False
    return True


def _check_metric(sweep: SweepFile, settings: Mapping[str, Any]) -> None:
    """A metric of a validation set that is not there would be waited for in vain."""
    loggers = settings.get("trainer", {}).get("logger")
    if not any("CSVLogger" in str(entry) for entry in (loggers if isinstance(loggers, list) else [loggers])):
        raise UserError(f"{sweep.path}: the experiment has no CSVLogger, from which trials are judged")
    sets = ((settings.get("data") or {}).get("init_args") or {}).get("validation")
    split, _, rest = sweep.metric.partition("/")
    if not sweep.metric:
        return
    if split not in ("train", "val", "perf", "data", "lr"):
        raise UserError(f"{sweep.path}: metric {sweep.metric!r}: keys read split/what, as in val/SET/loss/text")
    name = rest.partition("/")[0]
    if split == "val" and isinstance(sets, dict) and name not in sets:
        near = difflib.get_close_matches(name, list(sets), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sets)}"
        raise UserError(f"{sweep.path}: metric {sweep.metric!r}: no validation set {name!r}{hint}")
    documented = metric_of(sweep.metric)
    if documented and documented.better and documented.better != _BETTER[sweep.goal]:
        raise UserError(
            f"{sweep.path}: metric {sweep.metric!r}: {documented.better} is better, but goal is {sweep.goal}"
        )


def doubt_about_metric(sweep: SweepFile, settings: Mapping[str, Any]) -> str:
    """What to tell about a metric that no table has: it may be a callback's of the user's own, or misspelt."""
    if not sweep.metric or metric_of(sweep.metric):
        return ""
    sets = ((settings.get("data") or {}).get("init_args") or {}).get("validation") or {}
    known = [key for metric in METRICS for key in metric.expanded(list(sets))]
    near = difflib.get_close_matches(sweep.metric, known, n=1, cutoff=0.8)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"{sweep.path}: metric {sweep.metric!r} is none of docs/metrics.md{hint}; a trial that does not log it fails"
