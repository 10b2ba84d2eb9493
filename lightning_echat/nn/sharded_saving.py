"""How a sharded checkpoint gets its name: it is written to a folder of another, and renamed once it is whole."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from lightning_echat.nn.sharded_files import REST

_SHARDED = ("state_dict", "optimizer_states")


class BackgroundSaving:
    """A checkpoint that is being written in the background.

    Attributes:
        partial: Where it is written to.
        path: The name that it gets.
        committed: Done once it has its name and what was to follow is done; on ranks other than 0, once it is written.
    """

    def __init__(self, written: Future[Any], partial: Path, path: Path, *, commits: bool) -> None:
        self.partial, self.path = partial, path
        self.committed: Future[None] = Future()
        self._commits = commits
        self._actions: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        # All ranks' parts are on disk by then: DCP writes its index last, and rank 0 does.
        written.add_done_callback(self._commit)

    def then(self, action: Callable[[], None]) -> None:
        """Call `action` after the commit."""
        with self._lock:
            if not self.committed.done():
                self._actions.append(action)
                return
        if self.committed.exception() is None:
            action()

    def _commit(self, written: Future[Any]) -> None:
        try:
            written.result()
            if self._commits:
                commit(self.partial, self.path)
            with self._lock:
                for action in self._actions:
                    action()
                self.committed.set_result(None)
        # DCP's own is no Exception; whoever waits raises it.
        except BaseException as error:
            self.committed.set_exception(error)


def shards_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint every rank writes its part of, in Lightning's layout."""
    optimizers = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.get("optimizer_states", []))}
    return {"state_dict": checkpoint["state_dict"], **optimizers}


def write_rest(checkpoint: dict[str, Any], folder: Path) -> None:
    """What one rank writes for all."""
    torch.save({name: value for name, value in checkpoint.items() if name not in _SHARDED}, folder / REST)


def problem_of(error: BaseException, rank: int) -> str:
    """Whose trouble it is and what, in one line; DCP raises on every rank what one of them met."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = next(iter(error.failures.items()))
    lines = str(error).splitlines()
    return f"rank {rank}: {lines[0] if lines else type(error).__name__}"


def discard(folder: Path) -> None:
    """Delete what is left of a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def commit(partial: Path, path: Path) -> None:
    """Give a complete folder its name; one that bears the name already is replaced, and whole until then."""
    replaced = path.with_name(f".{path.name}.replaced")
    discard(replaced)
    if path.is_dir():
        path.rename(replaced)
    elif path.exists():
        path.unlink()
    partial.rename(path)
    discard(replaced)
