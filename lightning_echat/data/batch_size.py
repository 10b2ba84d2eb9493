"""`echat data batch-size`: the largest token budget of a batch that trains under a configuration.

Every trial is a `fit` of its own, in a process of its own, as the configuration says: precision, strategy and devices
are the run's, and one that dies of its memory takes nothing with it.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from rich.console import Console

from lightning_echat.contracts import UserError

_STEPS = 2
"""The second step is the larger: only then are there optimizer states beside activations and gradients."""
_ROUND = 64
_PRECISION = 1 / 16
_OUT_OF_MEMORY = ("outofmemoryerror", "out of memory", "not enough memory", "can't allocate memory", "std::bad_alloc")
_CPU_SHARE = 0.9
_FIT = ("-m", "lightning_echat.cli", "fit")
"""As a module, since a strategy of several processes starts the others with the words of the first."""


def batch_size(
    configs: list[Path],
    *,
    set: list[str] | None = None,
    smallest: int = 2048,
    largest: int = 2**20,
    memory_gigabytes: float | None = None,
) -> None:
    """Find the largest data.init_args.batching.tokens_per_batch with which two steps can be trained.

    Batches are real ones of the configured sources, filled to the budget whatever max_rows says. Nothing is logged, no
    checkpoint is written, nothing is validated. The devices of this machine take part as configured, other nodes do
    not. The answer holds for this machine and these settings: leave some of it for batches that are heavier than those
    tried, and for what callbacks and validation need.

    Args:
        configs: The YAML files of the run, as given to echat fit.
        set: KEY=VALUE, an option of echat fit, as model.init_args.init_from=runs/a; may be given several times.
        smallest: Ids to begin with; at least batching.max_ids.
        largest: Ids to stop at.
        memory_gigabytes: Memory that a process may take in a trial. On machines without accelerator nine tenths of
            what is free where it is not given, as there the system would end other programs too.

    Raises:
        UserError: Not even the smallest trains, or a trial fails for another reason than its memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("echat data batch-size starts its ranks itself; run it once, without torchrun or srun")
    if not 0 < smallest <= largest:
        raise UserError(f"smallest {smallest} and largest {largest} leave nothing to try")
    if memory_gigabytes is None and not torch.cuda.is_available():
        memory_gigabytes = _CPU_SHARE * psutil.virtual_memory().available / 1e9
    for option in set or []:
        if "=" not in option:
            raise UserError(f"set {option!r} is not of the form KEY=VALUE")
    words = [f"--config={config}" for config in configs] + [f"--{option}" for option in set or []]
    console = Console(highlight=False, soft_wrap=True)
    trial = partial(_train, words, memory_gigabytes=memory_gigabytes)
    found, too_large = search(trial, smallest=smallest, largest=largest, console=console)
    limit = f"{too_large} does not fit" if too_large else "the largest that was asked for"
    console.print(f"tokens_per_batch {found} ({limit}): --data.init_args.batching.tokens_per_batch={found}")


def search(trains: Callable[[int], bool], *, smallest: int, largest: int, console: Console) -> tuple[int, int | None]:
    """The largest budget that trains, to a sixteenth, and the smallest found that does not (None if all do).

    Raises:
        UserError: `smallest` does not train.
    """
    found, too_large, budget = 0, None, smallest
    while True:
        with console.status(f"training {_STEPS} steps of {budget} ids"):
            fits = trains(budget)
        console.print(f"{budget} ids: {'trains' if fits else 'out of memory'}")
        found, too_large = (budget, too_large) if fits else (found, budget)
        if not found:
            raise UserError(f"{smallest} ids do not fit; lower --smallest and batching.max_ids")
        if too_large is None:
            if found == largest:
                return found, None
            budget = min(2 * found, largest)
            continue
        budget = max(found + _ROUND, (found + too_large) // 2 // _ROUND * _ROUND)
        if too_large - found <= max(_ROUND, _PRECISION * found) or budget >= too_large:
            return found, too_large


def _train(words: list[str], budget: int, *, memory_gigabytes: float | None) -> bool:
    """Whether a fit of two steps with so many ids a batch ends well; False where its memory did not suffice."""
    with tempfile.TemporaryDirectory(prefix="echat-batch-size-") as folder:
        options = [
            f"--trainer.default_root_dir={folder}",
            f"--trainer.max_steps={_STEPS}",
            "--trainer.max_time=null",
            "--trainer.num_nodes=1",
            "--trainer.accumulate_grad_batches=1",
            "--trainer.limit_val_batches=0",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.logger=false",
            "--trainer.callbacks=null",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            f"--data.init_args.batching.tokens_per_batch={budget}",
            f"--data.init_args.batching.max_rows={budget}",
        ]
        # A checkout's data modules are named by path, as `echat fit` finds them: from the current folder.
        command = [sys.executable, *_FIT, *words, *options]
        limit = partial(_limit_memory, memory_gigabytes) if memory_gigabytes is not None else None
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", preexec_fn=limit, check=False)
    if done.returncode == 0:
        return True
    said = done.stderr + done.stdout
    if done.returncode == -signal.SIGKILL or any(sign in said.lower() for sign in _OUT_OF_MEMORY):
        return False
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    raise UserError(f"a trial with {budget} ids failed: {lines[-1].removeprefix('echat: error: ')}")


def _limit_memory(gigabytes: float) -> None:
    """Run in the trial's process before it starts; its own children inherit it, each for itself."""
    limit = round(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
