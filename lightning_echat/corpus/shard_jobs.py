"""Shards of the corpus as jobs for several processes.

A module of its own because each process imports it: the tokenizer's libraries would double what a start costs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_echat.corpus.dialogues import Split, voice_script, write_script
from lightning_echat.corpus.espeak import Espeak
from lightning_echat.data.writers import AudioFormat, write_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """One shard to make: dialogues [first, last) of a split."""

    path: Path
    split: Split
    first: int
    last: int
    seed: int
    audio_format: AudioFormat


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shard(job: ShardJob) -> int:
    """Voice and write one shard. Returns its number of dialogues."""
    espeak = Espeak()
    dialogues = (
        voice_script(
            write_script(job.split, index=index, seed=job.seed),
            split=job.split,
            index=index,
            seed=job.seed,
            espeak=espeak,
        )
        for index in range(job.first, job.last)
    )
    return write_shard(job.path, dialogues, audio_format=job.audio_format)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which stops the jobs in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_jobs(jobs: list[ShardJob], *, workers: int) -> None:
    """Make the shards, on several processes where there are several, with a progress bar."""
    if not jobs:
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("dialogues"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("synthesizing", total=sum(job.last - job.first for job in jobs))
        made = map(make_shard, jobs) if workers == 1 else _run_in_pool(jobs, workers=min(workers, len(jobs)))
        for dialogues in made:
            progress.advance(task, dialogues)


def _run_in_pool(jobs: list[ShardJob], *, workers: int) -> Iterator[int]:
    """Make shards on `workers` processes; yields dialogues as shards are done.

    The processes are spawned, not forked: the synthesizer and torch both hold state that does not survive a fork.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    futures: list[Future[int]] = [pool.submit(make_shard, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        # After Ctrl-C or an error: shards under way are finished (a few seconds), the rest is not begun.
        pool.shutdown(wait=True, cancel_futures=True)
