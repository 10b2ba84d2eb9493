"""How the trials of a sweep stand: a table that is redrawn in a terminal, lines everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_echat.studies.search import State, Trial
from lightning_echat.studies.sweep_file import SweepFile

_STYLES: dict[State, str] = {"running": "bold", "failed": "red", "stopped": "dim"}


@contextmanager
def shown(file: SweepFile, console: Console) -> Iterator[Callable[[Sequence[Trial]], None]]:
    """What a sweep is to show its trials to."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, refresh_per_second=2) as live:
        yield lambda trials: live.update(_table(file, trials, rows=console.height - 4))


def ranked(trials: Sequence[Trial], goal: str) -> list[Trial]:
    """Best first; those without a value last."""
    sign = 1.0 if goal == "minimize" else -1.0
    return sorted(trials, key=lambda t: (t.best is None, sign * t.best if t.best is not None else 0.0))


def short(value: object) -> str:
    """A parameter's value as a cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else text[:22] + " …"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Dotted names by their ends, as far as that tells them apart."""
    for parts in range(1, 9):
        ends = {name: ".".join(name.split(".")[-parts:]) for name in names}
        if len(set(ends.values())) == len(names):
            return ends
    return {name: name for name in names}


def _table(file: SweepFile, trials: Sequence[Trial], *, rows: int) -> Table:
    """Running trials, then the best."""
    names = list(file.parameters)
    ends = short_names(names)
    done = sum(trial.state != "running" for trial in trials)
    table = Table(title=f"{done} of {len(trials)} trials done; best first", box=None, title_justify="left")
    for head in ("trial", "state", file.metric or "value", "logged", "seconds", *(ends[name] for name in names)):
        table.add_column(head, overflow="ellipsis")
    order = sorted(ranked(trials, file.goal), key=lambda trial: trial.state != "running")
    for trial in order[: max(rows, 3)]:
        best = "" if trial.best is None else f"{trial.best:.4g}"
        values = [short(trial.parameters.get(name)) for name in names]
        cells = [trial.name, trial.state, best, str(len(trial.history)), f"{trial.seconds:.0f}", *values]
        table.add_row(*cells, style=_STYLES.get(trial.state, ""))
    return table


class _Lines:
    """A line whenever a trial starts or ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[str, State] = {}

    def __call__(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if self._said.get(trial.name) == trial.state:
                continue
            self._said[trial.name] = trial.state
            values = ", ".join(
                f"{end}={short(trial.parameters[n])}" for n, end in short_names([*trial.parameters]).items()
            )
            best = "" if trial.best is None else f"  best {trial.best:.4g} of {len(trial.history)}"
            reason = f": {trial.reason}" if trial.reason else ""
            self._console.print(f"{trial.name}  {trial.state}{best}  {values}{reason}", markup=False, soft_wrap=True)
