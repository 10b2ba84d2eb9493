"""Several processes that train together, started as a cluster starts them, for tests of what needs more than one."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

# The processes are forked from one that has imported this, so that each is there at once.
multiprocessing.set_forkserver_preload(["lightning_echat.stages.empathy", "lightning_echat.testing", "tests.ranks"])


def run_on_ranks(function: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Call `function(*args)` in so many processes; one that fails ends all, and its traceback is raised here."""
    start_processes(_run_rank, args=(ranks, free_port(), function, args), nprocs=ranks, start_method="forkserver")


def statuses_of_ranks(function: Callable[..., None], *args: Any, within: float, ranks: int = 2) -> list[int | None]:
    """The exit statuses of such processes, each left to end by itself; None for one that did not in so many seconds."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [context.Process(target=_run_rank, args=(rank, ranks, port, function, args)) for rank in range(ranks)]
    for process in processes:
        process.start()
    ends = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _run_rank(rank: int, ranks: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    # What torchrun sets: Lightning then launches nothing itself.
    sizes = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    os.environ |= place | sizes | {"TORCHELASTIC_RUN_ID": "test"}
    function(*args)
