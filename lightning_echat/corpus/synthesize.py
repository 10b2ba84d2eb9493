"""`echat data synthesize`: the corpus that the quickstart trains on, made on this machine.

One job makes one shard; jobs run in as many processes as there are cores. What is finished stays: a shard is renamed
into place when it is whole, and a second run makes only what is missing. `corpus.json` holds what the corpus was made
with; a folder made otherwise is refused, never mixed.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_echat import __version__
from lightning_echat.contracts import UserError
from lightning_echat.corpus.dialogues import Split, write_script
from lightning_echat.corpus.espeak import Espeak
from lightning_echat.corpus.shard_jobs import ShardJob, make_shards
from lightning_echat.corpus.word_tokenizer import fit_tokenizer
from lightning_echat.data.files import TEMPORARY_SUFFIX, write_atomically, write_json
from lightning_echat.data.process_pool import count_cores
from lightning_echat.data.shard_index import FOLDER_INDEX, write_index
from lightning_echat.data.writers import (
    AudioFormat,
    check_audio_format,
    shard_name,
)
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.prompts import load_prompt_set
from lightning_echat.tokens.thinking import write_label_thinking

RECIPE = 2
"""Raised whenever the same parameters would give another corpus."""

_MANIFEST, _TEXTS, _TOKENIZER = "corpus.json", "text.jsonl", "tokenizer"
_PROMPT_SET = "english"

_SPLITS = (
    Split(name="train", number=0),
    Split(name="validation", number=1, reserved=True),
    Split(name="held_out_voices", number=2, reserved=True),
    Split(name="held_out_types", number=3, reserved=True, klatt=True),
    Split(name="text", number=4, spoken=False),
)


def synthesize(
    out: Path,
    *,
    train_dialogues: int = 3000,
    validation_dialogues: int = 200,
    held_out_voices_dialogues: int = 400,
    held_out_types_dialogues: int = 200,
    text_dialogues: int = 600,
    train_speakers: int = 300,
    validation_speakers: int = 30,
    held_out_voices_speakers: int = 60,
    held_out_types_speakers: int = 30,
    seed: int = 0,
    workers: int | None = None,
    audio_format: AudioFormat = "wav",
    dialogues_per_shard: int = 100,
    overwrite: bool = False,
) -> None:
    """Synthesize a spoken-dialogue corpus with espeak-ng: shards, texts and a tokenizer.

    Args:
        out: Folder to write; what a run was interrupted in is continued.
        train_dialogues: Dialogues to train on.
        validation_dialogues: Dialogues of other speakers to follow training with.
        held_out_voices_dialogues: Dialogues of further speakers to test on.
        held_out_types_dialogues: Dialogues in a type of voice that no other split has.
        text_dialogues: Written question and answer pairs.
        train_speakers: Speakers in the training split.
        validation_speakers: Speakers in the validation split.
        held_out_voices_speakers: Speakers in the held-out voices.
        held_out_types_speakers: Speakers in the held-out voice types.
        seed: Same seed, same corpus, whatever the number of workers.
        workers: Processes; one per core by default.
        audio_format: wav, or flac for two thirds of the space.
        dialogues_per_shard: Dialogues in a shard.
        overwrite: Replace a corpus made with other parameters.

    Raises:
        UserError: A size makes no sense, the synthesizer is missing, or `out` holds something else.
    """
    sizes = {
        "train": (train_dialogues, train_speakers),
        "validation": (validation_dialogues, validation_speakers),
        "held_out_voices": (held_out_voices_dialogues, held_out_voices_speakers),
        "held_out_types": (held_out_types_dialogues, held_out_types_speakers),
        "text": (text_dialogues, 0),
    }
    splits = tuple(replace(split, dialogues=sizes[split.name][0], speakers=sizes[split.name][1]) for split in _SPLITS)
    workers = count_cores() if workers is None else workers
    _check_sizes(splits, dialogues_per_shard=dialogues_per_shard, seed=seed, workers=workers)
    check_audio_format(audio_format)
    parameters = {
        "recipe": RECIPE,
        "seed": seed,
        "audio_format": audio_format,
        "dialogues_per_shard": dialogues_per_shard,
        "splits": {split.name: {"dialogues": split.dialogues, "speakers": split.speakers} for split in splits},
    }
    _claim_folder(out, parameters=parameters, overwrite=overwrite)
    jobs = list(_jobs(out, splits, seed=seed, audio_format=audio_format, dialogues_per_shard=dialogues_per_shard))
    make_shards([job for job in jobs if not job.path.exists()], workers=workers)
    _finish(out, splits, seed=seed)


def _check_sizes(splits: tuple[Split, ...], *, dialogues_per_shard: int, seed: int, workers: int) -> None:
    """Raise UserError for a size that makes no corpus."""
    if dialogues_per_shard < 1:
        raise UserError(f"dialogues_per_shard must be at least 1, not {dialogues_per_shard}")
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    if seed < 0:
        raise UserError(f"seed must not be negative, but is {seed}")
    for split in splits:
        if split.dialogues < 0:
            raise UserError(f"{split.name}_dialogues must not be negative, but is {split.dialogues}")
        if split.spoken and split.dialogues and split.speakers < 1:
            raise UserError(f"{split.name}_speakers must be at least 1, not {split.speakers}")
    if not splits[0].dialogues:
        raise UserError("train_dialogues must be at least 1")


def _claim_folder(out: Path, *, parameters: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ours: new, or made with the same parameters, or to be replaced.

    Raises:
        UserError: The folder holds another corpus, or something that is no corpus.
    """
    manifest = out / _MANIFEST
    if manifest.exists():
        try:
            made_with = json.loads(manifest.read_text())["parameters"]
        except (json.JSONDecodeError, KeyError, TypeError):
            made_with = None
        if made_with != parameters and not overwrite:
            raise UserError(
                f"{out} holds a corpus made with other parameters ({_difference(made_with, parameters)}):"
                " choose another folder or pass --overwrite true"
            )
        if overwrite:
            _remove_corpus(out, made_with=made_with or parameters)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no corpus (it has no {_MANIFEST}): choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(f"*/*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    if not manifest.exists():
        versions = {
            "lightning_echat": __version__,
            "espeak_ng": Espeak().version(),
            "python": platform.python_version(),
        }
        write_json(manifest, content={"schema": 1, "parameters": parameters, "versions": versions})


def _difference(old: Any, new: dict[str, Any]) -> str:
    """Names of the parameters that differ, for a message of one line."""
    if not isinstance(old, dict):
        return f"{_MANIFEST} cannot be read"
    changed = [name for name in new if name != "splits" and old.get(name) != new[name]]
    old_splits = old.get("splits", {})
    changed += [
        f"{split}_{what}"
        for split, sizes in new["splits"].items()
        for what, size in sizes.items()
        if old_splits.get(split, {}).get(what) != size
    ]
    return ", ".join(changed) or "other splits"


def _remove_corpus(out: Path, *, made_with: dict[str, Any]) -> None:
    """Delete what an earlier run wrote, and nothing else."""
    for split in made_with["splits"]:
        for path in [*(out / split).glob("shard-*.tar"), out / split / FOLDER_INDEX]:
            path.unlink(missing_ok=True)
    for path in [out / _TEXTS, *(out / _TOKENIZER).glob("*.json"), out / _MANIFEST]:
        path.unlink(missing_ok=True)


def _jobs(
    out: Path, splits: tuple[Split, ...], *, seed: int, audio_format: AudioFormat, dialogues_per_shard: int
) -> Iterator[ShardJob]:
    """Every shard of the corpus, finished or not."""
    for split in splits:
        for number, first in enumerate(range(0, split.dialogues, dialogues_per_shard)):
            yield ShardJob(
                path=out / split.name / shard_name(number),
                split=split,
                first=first,
                last=min(first + dialogues_per_shard, split.dialogues),
                seed=seed,
                audio_format=audio_format,
            )


def _finish(out: Path, splits: tuple[Split, ...], *, seed: int) -> None:
    """Indices, texts and tokenizer where they are missing or out of date, then one line per split."""
    console = Console()
    for split in splits:
        if split.dialogues:
            index = _index_of(out / split.name)
            console.print(_summary(split.name, index), highlight=False, soft_wrap=True)
    texts = out / _TEXTS
    if not texts.exists():
        write_texts(texts, [split for split in splits if not split.reserved], seed=seed)
    if not (out / _TOKENIZER / "tokenizer.json").exists():
        fit_tokenizer(texts, out / _TOKENIZER)
    hours = sum(_index_of(out / split.name)["seconds"] for split in splits if split.dialogues) / 3600
    console.print(
        f"{out}: {sum(split.dialogues for split in splits)} dialogues, {hours:.2f} h of audio", highlight=False
    )


def _index_of(folder: Path) -> dict[str, Any]:
    """The index of a split, written anew when a shard is younger than it."""
    path = folder / FOLDER_INDEX
    shards = list(folder.glob("shard-*.tar"))
    if path.exists() and all(shard.stat().st_mtime_ns <= path.stat().st_mtime_ns for shard in shards):
        index = json.loads(path.read_text())
        if {shard["file"] for shard in index["shards"]} == {shard.name for shard in shards}:
            return index
    return write_index(folder)


def _summary(name: str, index: dict[str, Any]) -> str:
    """One line about a split: dialogues, hours, label histograms."""
    histograms = (
        f"{label_set} " + "/".join(f"{label} {count}" for label, count in counts.items())
        for label_set, counts in index["labels"].items()
    )
    return "; ".join([f"{name}: {index['samples']} dialogues, {index['seconds'] / 3600:.2f} h", *histograms])


def write_texts(path: Path, splits: list[Split], *, seed: int) -> None:
    """Every distinct text that training may show a model, in order of first use, as JSONL.

    The wording around dialogues comes first: prompts would be a hundred tokens long in a tokenizer that does not know
    their words.
    """
    texts: dict[str, None] = dict.fromkeys(_wording_around_dialogues())
    for split in splits:
        for index in range(split.dialogues):
            for exchange in write_script(split, index=index, seed=seed).exchanges:
                for text in (exchange.query, exchange.reply, exchange.thinking):
                    if text:
                        texts.setdefault(text)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    write_atomically(path, content=lines.encode())


def _wording_around_dialogues() -> Iterator[str]:
    """Prompts, turn headers and names in label thinking, without markers and tags, which are tokens already."""
    prompts = load_prompt_set(_PROMPT_SET)
    instructions = [line for lines in prompts.instructions.values() for line in lines]
    labels = dict.fromkeys(LABEL_SETS, "none")
    thinking = write_label_thinking("x", labels, "neutral", prompts.thinking)
    for text in [
        *prompts.system.values(),
        prompts.user,
        prompts.assistant,
        *instructions,
        ", ".join(LABEL_SETS),
        thinking,
    ]:
        yield from (part for part in re.split(r"<[^<>]*>|\{labels\}", text) if part.strip())
