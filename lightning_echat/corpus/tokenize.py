"""`echat data tokenize`: speech codes for every reply of any number of shards.

Shards are copied member for member; only the sidecars change. One job is one shard, and a shard that exists is whole.
`tokenization.json` in the output folder says which tokenizer made the codes and, for each shard, what was tokenized and
what was skipped and why; a shard is done again only when its source is younger, or when it is not on that list.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lightning_echat.contracts import SAMPLE_RATE, SampleRejected, UserError
from lightning_echat.data.decoding import SIDECAR, ParsedDialogue, decode_waveform, parse_dialogue
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, StoredDialogue, expand_shards, read_shard
from lightning_echat.data.writers import TEMPORARY_SUFFIX, write_index, write_json
from lightning_echat.nn.token2wav.interface import SpeechTokenizer, load_speech_tokenizer, read_config
from lightning_echat.nn.token2wav.kmeans import CONFIG_NAME, fit_kmeans, log_mel_blocks

_MANIFEST = "tokenization.json"
_INDEX = "index.json"
_MAX_DIFFERENCE = 0.08
"""Seconds by which codes and audio may differ: two codes."""
_MAX_SECONDS = 60.0
_FIT_BLOCKS = 20_000
"""Blocks that a codebook is fitted on, 13 minutes of speech: the fit then costs seconds, more blocks changed nothing."""
_TRAIN = "train"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """A shard to copy with codes."""

    source: Path
    target: Path
    speech_tokenizer: Path


@dataclass(slots=True, kw_only=True)
class ShardRecord:
    """What became of the turns of a shard.

    Attributes:
        dialogues: Dialogues copied.
        turns: Assistant turns that have codes now.
        codes: Codes written.
        skipped: Reason -> turns without codes, or whole dialogues whose sidecar cannot be read.
    """

    dialogues: int = 0
    turns: int = 0
    codes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count a turn that gets no codes."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def tokenize(
    shards_in: list[str] | str,
    out: Path,
    *,
    speech_tokenizer: Path,
    fit: bool = False,
    codebook_size: int = 256,
    workers: int | None = None,
    seed: int = 0,
) -> None:
    """Add speech codes to the assistant turns of shards.

    Args:
        shards_in: Folders, tar files or patterns. A folder is taken with all its subfolders of shards, whose names are
            kept, so that a corpus of several splits is tokenized at once.
        out: Folder for the new shards; what a run was interrupted in is continued.
        speech_tokenizer: Folder of the speech tokenizer.
        fit: Fit a k-means tokenizer first where that folder does not exist yet: on the split "train" if there is one,
            else on all shards.
        codebook_size: Number of codes of a tokenizer to fit.
        workers: Processes; one per core by default.
        seed: Of the fit.

    Raises:
        UserError: Shards or tokenizer are missing or damaged, or `out` holds codes of another tokenizer.
    """
    patterns = [shards_in] if isinstance(shards_in, str) else shards_in
    sources = find_shards(patterns, out=out)
    if fit:
        _fit_if_missing(speech_tokenizer, sources, codebook_size=codebook_size, seed=seed)
    load_speech_tokenizer(speech_tokenizer)
    records = _claim_folder(out, fingerprint=_fingerprint(speech_tokenizer))
    jobs = [
        ShardJob(source=source, target=out / name, speech_tokenizer=speech_tokenizer)
        for name, source in sources.items()
        if not _is_done(source, out / name, record=records.get(str(name)))
    ]
    _run_jobs(jobs, out=out, records=records, workers=workers or _count_cores())
    _finish(out, names=list(sources), records=records)


def find_shards(patterns: Sequence[str], *, out: Path) -> dict[Path, Path]:
    """Name under the output folder -> shard, for everything that the patterns name.

    Raises:
        UserError: A pattern matches nothing, two shards would get the same name, or a shard would replace itself.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        root = Path(pattern).expanduser()
        if root.is_dir():
            # The output may lie inside the corpus; it is no input of the next run.
            folders = [folder for folder in _shard_folders(root) if not folder.resolve().is_relative_to(out.resolve())]
            shards = [Path(path) for path in expand_shards([str(folder) for folder in folders or [root]])]
            named = {path.relative_to(root): path for path in shards}
        else:
            named = {Path(path).name: Path(path) for path in expand_shards([pattern])}
        for name, path in named.items():
            name = Path(name)
            if found.get(name, path) != path:
                raise UserError(f"{found[name]} and {path} would both become {out / name}; tokenize them apart")
            if (out / name).resolve() == path.resolve():
                raise UserError(f"{path} would be written over itself; choose another folder than {out}")
            found[name] = path
    return found


def _shard_folders(root: Path) -> list[Path]:
    """The folder and those below it that hold shards."""
    return sorted({path.parent for path in root.rglob("*.tar")})
