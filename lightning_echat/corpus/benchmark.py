"""`echat data benchmark`: the synthetic held-out item set of docs/evaluation.md, in voices and texts of its own.

Five categories of equal size. An item of `emotion`, `age`, `gender` or `event` carries that cue (age and gender are in
any voice); one of `multi` an emotion and an event. Every item has a speaker of its own, a third of them with the vocal
tract that no training hears; its words are of the tenth that training never uses; and the same words are there in one
neutral voice, for the control. An item is a pure function of seed, category and number.
"""

from __future__ import annotations

import json
import platform
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lightning_echat import __version__
from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.corpus.dialogues import (
    AGES,
    EMOTIONS,
    EVENTS,
    GENDERS,
    Exchange,
    Split,
    speaker_of,
    voice_query,
)
from lightning_echat.corpus.espeak import Espeak
from lightning_echat.corpus.queries import draw_query
from lightning_echat.corpus.replies import choose_reply_emotion, write_reply
from lightning_echat.corpus.voices import ASSISTANT, Speaker, draw_speaker
from lightning_echat.data.files import TEMPORARY_SUFFIX, write_json
from lightning_echat.data.process_pool import count_cores, progress_bar, run_jobs
from lightning_echat.data.shard_index import FOLDER_INDEX, write_index
from lightning_echat.data.tar_samples import SCHEMA
from lightning_echat.data.writers import add_member, encode_audio, shard_name

RECIPE = 1
"""Raised whenever the same parameters would give other items."""

CATEGORIES = ("emotion", "age", "gender", "event", "multi")
HELD_OUT, UNSEEN, SEEN = "held-out voices", "unseen voice types", "seen voices"

_ITEMS, _SEEN_VOICES, _MANIFEST = "items", "seen_voices", "benchmark.json"
_STREAM = 5
"""Part of every seed; the splits of the corpus have 0 to 4."""
_TRAIN = Split(name="train", number=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkShard:
    """One shard to make: items [first, last) of the whole set, or of those in seen voices."""

    path: Path
    first: int
    last: int
    seed: int
    train_speakers: int
    seen: bool


def benchmark(
    out: Path,
    *,
    items_per_category: int = 280,
    seen_voices_items: int = 280,
    train_speakers: int = 300,
    seed: int = 0,
    workers: int | None = None,
    items_per_shard: int = 100,
    overwrite: bool = False,
) -> None:
    """Synthesize the benchmark's item set with espeak-ng: OUT/items, and OUT/seen_voices for understanding.

    Args:
        out: Folder to write; what a run was interrupted in is continued.
        items_per_category: Items of each of the five categories; a third are spoken in voice types unheard in training.
        seen_voices_items: Items in the voices of the training speakers, with new words, for comparison.
        train_speakers: Speakers that the corpus was made with (echat data synthesize).
        seed: That of the corpus, so that seen voices are seen.
        workers: Processes; one per core by default.
        items_per_shard: Items in a shard.
        overwrite: Replace a set made with other parameters.

    Raises:
        UserError: A size makes no sense, the synthesizer is missing, or `out` holds something else.
    """
    for name, value, least in (
        ("items_per_category", items_per_category, 1),
        ("seen_voices_items", seen_voices_items, 0),
        ("train_speakers", train_speakers, 1),
        ("seed", seed, 0),
        ("items_per_shard", items_per_shard, 1),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    sizes = {_ITEMS: items_per_category * len(CATEGORIES), _SEEN_VOICES: seen_voices_items}
    parameters = {"recipe": RECIPE, "seed": seed, "train_speakers": train_speakers, "items_per_shard": items_per_shard}
    _claim(out, parameters={**parameters, "items": sizes}, overwrite=overwrite)
    jobs = [
        BenchmarkShard(
            path=out / folder / shard_name(number),
            first=first,
            last=min(first + items_per_shard, size),
            seed=seed,
            train_speakers=train_speakers,
            seen=folder == _SEEN_VOICES,
        )
        for folder, size in sizes.items()
        for number, first in enumerate(range(0, size, items_per_shard))
    ]
    _make([job for job in jobs if not job.path.exists()], workers=workers or count_cores())
    for folder, size in sizes.items():
        if size:
            index = write_index(out / folder)
            seconds = index["seconds"] / 3600
            Console().print(f"{out / folder}: {index['samples']} items, {seconds:.2f} h", highlight=False)


def _claim(out: Path, *, parameters: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours: new, or made with the same parameters, or to be replaced."""
    manifest = out / _MANIFEST
    if manifest.exists():
        made_with = json.loads(manifest.read_text()).get("parameters")
        if made_with == parameters and not overwrite:
            return
        if not overwrite:
            raise UserError(f"{out} holds items made with other parameters; choose another folder or --overwrite true")
        for folder in (_ITEMS, _SEEN_VOICES):
            for path in [*(out / folder).glob("shard-*.tar*"), out / folder / FOLDER_INDEX]:
                path.unlink(missing_ok=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no benchmark (it has no {_MANIFEST}): choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    versions = {"lightning_echat": __version__, "espeak_ng": Espeak().version(), "python": platform.python_version()}
    write_json(manifest, content={"schema": 1, "parameters": parameters, "versions": versions})


def _make(jobs: list[BenchmarkShard], *, workers: int) -> None:
    if not jobs:
        return
    with progress_bar("items") as progress:
        task = progress.add_task("synthesizing", total=sum(job.last - job.first for job in jobs))
        for _, items in run_jobs(make_shard, jobs, workers=workers):
            progress.advance(task, items)


def make_shard(job: BenchmarkShard) -> int:
    """Voice and write one shard, renamed into place when it is whole. Returns its number of items."""
    espeak = Espeak()
    job.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.path.with_name(job.path.name + TEMPORARY_SUFFIX)
    with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(job.first, job.last):
            category, index = ("multi", number) if job.seen else (CATEGORIES[number % 5], number // 5)
            item = write_item(category, index=index, seed=job.seed, train_speakers=job.train_speakers, seen=job.seen)
            for name, content in voice_item(item, espeak=espeak).items():
                add_member(tar, f"{item.key}.{name}", content)
    temporary.replace(job.path)
    return job.last - job.first


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkItem:
    """An item before anybody speaks it."""

    key: str
    category: str
    source: str
    speaker: Speaker
    exchange: Exchange
    voice_seed: tuple[int, ...]


def write_item(category: str, *, index: int, seed: int, train_speakers: int = 300, seen: bool = False) -> BenchmarkItem:
    """The words, labels and speaker of item `index` of a category."""
    number = len(CATEGORIES) if seen else CATEGORIES.index(category)
    stream = (seed, _STREAM, number, index)
    rng = np.random.default_rng(stream)
    query = draw_query(rng, reserved=True)
    # Every label of the cue in turn. The turns are of different lengths, so that no label goes with another.
    age, gender = AGES[index // 3 % 3], GENDERS[index // 9 % 2]
    unseen = not seen and index % 3 == 2
    if seen:
        speaker = speaker_of(replace(_TRAIN, speakers=train_speakers), index=index % train_speakers, seed=seed)
    else:
        name = f"benchmark-{category}-s{index:04d}"
        speaker = draw_speaker(rng, name=name, age=age, gender=gender, klatt=unseen)
    labels = {
        "age": speaker.age,
        "gender": speaker.gender,
        "emotion": EMOTIONS[index % 4] if category in ("emotion", "multi") else "neutral",
        "event": EVENTS[index % 5] if category in ("event", "multi") else "none",
    }
    exchange = Exchange(
        query=query.text,
        labels=labels,
        reply=write_reply(query.topic, labels=labels),
        reply_emotion=choose_reply_emotion(labels),
        thinking=None,
    )
    return BenchmarkItem(
        key=f"{'seen' if seen else category}-{index:05d}",
        category=category,
        source=SEEN if seen else UNSEEN if unseen else HELD_OUT,
        speaker=speaker,
        exchange=exchange,
        voice_seed=(*stream, 1),
    )


def voice_item(item: BenchmarkItem, *, espeak: Espeak) -> dict[str, bytes]:
    """The members of an item: sidecar, query, and the same words in the neutral voice."""
    exchange = item.exchange
    query = voice_query(exchange, speaker=item.speaker, rng=np.random.default_rng(item.voice_seed), espeak=espeak)
    plain = replace(exchange, labels={"emotion": "neutral", "event": "none"})
    neutral = voice_query(plain, speaker=ASSISTANT, rng=np.random.default_rng((*item.voice_seed, 2)), espeak=espeak)
    sidecar = {
        "schema": SCHEMA,
        "category": item.category,
        "source": item.source,
        "language": "en",
        "speaker": item.speaker.name,
        "voice_type": item.speaker.voice_type,
        "neutral_audio": "neutral.wav",
        "turns": [
            {
                "role": "user",
                "text": exchange.query,
                "audio": "0.wav",
                "seconds": round(len(query) / SAMPLE_RATE, 4),
                "labels": exchange.labels,
            },
            {"role": "assistant", "text": exchange.reply, "labels": {"emotion": exchange.reply_emotion}},
        ],
    }
    return {
        "json": json.dumps(sidecar, ensure_ascii=False).encode(),
        "0.wav": encode_audio(torch.from_numpy(query), audio_format="wav"),
        "neutral.wav": encode_audio(torch.from_numpy(neutral), audio_format="wav"),
    }
