"""W&B's own search engine, the package `sweeps`, which needs neither account nor server."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lightning_echat.contracts import UserError

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(slots=True, kw_only=True)
class Trial:
    """One set of parameters, tried.

    Attributes:
        name: t0000 and so on; its folder.
        parameters: Name -> value.
        state: "stopped" was ended early by hyperband, "failed" ended otherwise or never logged the metric.
        history: The metric's values so far, in the order of steps.
        best: The best of them; None where there is none.
        seconds: Spent.
        reason: Why it failed.
        code: Fingerprint of the code that it was run with.
    """

    name: str
    parameters: dict[str, Any]
    state: State = "running"
    history: list[float] = field(default_factory=list)
    best: float | None = None
    seconds: float = 0.0
    reason: str = ""
    code: str = ""


def need_engine() -> None:
    """Raise `UserError` where the engine is not installed."""
    # The engine's own use of pydantic, which no user of ours can change.
    warnings.filterwarnings("ignore", message=".*onfig.*", module=r"pydantic|sweeps")
    for module in ("sweeps.config", "sklearn", "jsonschema"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UserError(
                "echat sweep needs W&B's search engine: pip install -c constraints.txt '.[sweep]' and then "
                "pip install --no-deps sweeps==0.3.0 (it asks for an older numpy than it needs)"
            )


def schema_violations(config: Mapping[str, Any]) -> list[str]:
    """What W&B's own schema has against a sweep file."""
    need_engine()
    from sweeps import schema_violations_from_proposed_config

    try:
        return [" ".join(said.split()) for said in schema_violations_from_proposed_config(dict(config))]
    except ValueError as error:
        return [str(error)]


class Search:
    """Suggests trials and says which to stop.

    Args:
        config: A sweep file's content.
        seed: The next suggestion follows from it and from the trials so far.
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int) -> None:
        need_engine()
        self._config = dict(config)
        self._metric = (self._config.get("metric") or {}).get("name", "")
        self._seed = seed

    def suggest(self, trials: Sequence[Trial]) -> dict[str, Any] | None:
        """Parameters of the next trial; None once the search is exhausted."""
        import sweeps

        # The engine draws from numpy's global generator.
        before = np.random.get_state()
        np.random.seed((self._seed * 100_003 + len(trials)) % 2**32)
        try:
            run = sweeps.next_run(self._config, self._runs(trials), validate=True)
        finally:
            np.random.set_state(before)
        if run is None:
            return None
        return {name: _plain(entry["value"]) for name, entry in run.config.items()}

    def to_stop(self, trials: Sequence[Trial]) -> set[str]:
        """Names of the running trials that hyperband gives up."""
        import sweeps

        if "early_terminate" not in self._config:
            return set()
        running = {trial.name for trial in trials if trial.state == "running"}
        stopped = sweeps.stop_runs(self._config, self._runs(trials), validate=True)
        return {str(run.name) for run in stopped} & running

    def _runs(self, trials: Sequence[Trial]) -> list[Any]:
        import sweeps

        states = {
            "running": sweeps.RunState.running,
            "finished": sweeps.RunState.finished,
            "stopped": sweeps.RunState.finished,
            "failed": sweeps.RunState.failed,
        }
        return [
            sweeps.SweepRun(
                name=trial.name,
                state=states[trial.state],
                config={name: {"value": value} for name, value in trial.parameters.items()},
                history=[{self._metric: value} for value in trial.history],
                summary_metrics={self._metric: trial.history[-1]} if trial.history else {},
            )
            for trial in trials
        ]


def _plain(value: Any) -> Any:
    """A numpy number as Python's own: what JSON and command lines take."""
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
