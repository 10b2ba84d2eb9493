"""How the steps of a study stand: a table that is redrawn in a terminal, lines everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_echat.studies.plan import Plan
from lightning_echat.studies.run_steps import Progress, Status, last_line, log_file

_STYLES: dict[Status, str] = {"running": "bold", "failed": "red", "blocked": "red", "done": "green", "reused": "dim"}


@contextmanager
def shown(plan: Plan, console: Console) -> Iterator[Callable[[Mapping[str, Progress]], None]]:
    """What `run_steps` is to show its progress to."""
    if not console.is_terminal:
        yield _Lines(plan, console)
        return
    with Live(console=console, refresh_per_second=2) as live:
        yield lambda progress: live.update(_table(plan, progress, rows=console.height - 4))


def _table(plan: Plan, progress: Mapping[str, Progress], *, rows: int) -> Table:
    """The steps that fit: running and failed ones before those that wait, and these before what is done."""
    done = sum(one.status in ("done", "reused") for one in progress.values())
    table = Table(title=f"{done} of {len(progress)} steps done", box=None, title_justify="left")
    for head in ("step", "for", "state", "time", "says"):
        table.add_column(head, no_wrap=True, overflow="ellipsis")
    order = ("running", "failed", "blocked", "waiting", "done", "reused")
    for name, one in sorted(progress.items(), key=lambda entry: order.index(entry[1].status))[: max(rows, 3)]:
        says = last_line(log_file(plan.recipe.out, name)) if one.status == "running" else one.reason
        style = _STYLES.get(one.status, "")
        table.add_row(name, _users(plan, name), one.status, _clock(one.seconds), says, style=style)
    return table


def _users(plan: Plan, step: str) -> str:
    users = plan.users(step)
    variants = list(dict.fromkeys(run.variant for run in users))
    seeds = sorted({run.seed for run in users})
    return f"{'; '.join(variants)} (seed {', '.join(map(str, seeds))})"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class _Lines:
    """A line whenever a step starts or ends."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._said: dict[str, Status] = {}

    def __call__(self, progress: Mapping[str, Progress]) -> None:
        for name, one in progress.items():
            if one.status == self._said.get(name, "waiting"):
                continue
            self._said[name] = one.status
            done = sum(other.status in ("done", "reused") for other in progress.values())
            time = f" in {_clock(one.seconds)}" if one.status == "done" else ""
            reason = f": {one.reason}" if one.reason else ""
            self._console.print(
                f"{done}/{len(progress)}  {name}  {one.status}{time}{reason}  [{_users(self._plan, name)}]",
                markup=False,
                soft_wrap=True,
            )


def log_folder(plan: Plan) -> Path:
    """Where steps print to."""
    return plan.recipe.out / "logs"
