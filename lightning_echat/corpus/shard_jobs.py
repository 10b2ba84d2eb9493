"""Shards of the corpus as jobs for several processes.

A module of its own because each process imports it: the tokenizer's libraries would double what a start costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_echat.corpus.dialogues import Split, voice_script, write_script
from lightning_echat.corpus.espeak import Espeak
from lightning_echat.data.process_pool import progress_bar, run_jobs
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


def make_shards(jobs: list[ShardJob], *, workers: int) -> None:
    """Make the shards, on several processes where there are several, with a progress bar."""
    if not jobs:
        return
    with progress_bar("dialogues") as progress:
        task = progress.add_task("synthesizing", total=sum(job.last - job.first for job in jobs))
        for _, dialogues in run_jobs(make_shard, jobs, workers=workers):
            progress.advance(task, dialogues)
