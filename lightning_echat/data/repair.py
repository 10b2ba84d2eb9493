"""Clean copies of shards: the samples that are of use, with what their sidecars say put right."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.data.decoding import SIDECAR, decode_waveform
from lightning_echat.data.files import TEMPORARY_SUFFIX
from lightning_echat.data.process_pool import progress_bar, run_jobs
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.remote import ShardAccess, is_url
from lightning_echat.data.shard_index import write_index
from lightning_echat.data.shards import read_samples
from lightning_echat.data.tar_samples import StoredSample
from lightning_echat.data.writers import add_member

_TOLERANCE = 0.001
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".tgz")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy:
    source: str
    target: Path
    ordinals: list[int]
    access: ShardAccess


def repair_shards(keep: Mapping[str, list[int]], *, out: Path, workers: int, access: ShardAccess) -> dict[Path, int]:
    """Copy the chosen samples of each shard into a shard of the same name, and index the folder.

    Args:
        keep: Shard -> places of the samples to copy, all of them usable.
        out: Folder that holds no shards yet.
        workers: Processes.
        access: How shards behind a URL are reached.

    Returns:
        New shard -> its samples.

    Raises:
        UserError: The folder holds shards, two shards have one name, or there is nothing to keep.
    """
    if not keep:
        raise UserError("no shard holds a usable sample; there is nothing to repair")
    if any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards already; name another folder for the clean copies")
    copies: dict[Path, _Copy] = {}
    for source, ordinals in keep.items():
        copy = _Copy(source=source, target=out / _plain_name(source), ordinals=ordinals, access=access)
        if copy.target in copies:
            raise UserError(f"{copies[copy.target].source} and {source} have one name; repair them apart")
        copies[copy.target] = copy
    out.mkdir(parents=True, exist_ok=True)
    written: dict[Path, int] = {}
    with progress_bar("shards") as progress:
        bar = progress.add_task("repairing", total=len(copies))
        for copy, samples in run_jobs(_copy_shard, list(copies.values()), workers=workers):
            written[copy.target] = samples
            progress.advance(bar)
    write_index(out)
    return written


def _plain_name(source: str) -> str:
    name = (source.partition("?")[0] if is_url(source) else source).rpartition("/")[2]
    for ending in _COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return name if name.endswith(".tar") else f"{name}.tar"


def _copy_shard(copy: _Copy) -> int:
    """Write one clean shard under a temporary name and rename it. Returns its samples."""
    temporary = copy.target.with_name(copy.target.name + TEMPORARY_SUFFIX)
    samples = 0
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for stored in read_samples(copy.source, copy.ordinals, counter=SkipCounter(), access=copy.access):
                for name, content in _clean_members(stored).items():
                    add_member(tar, f"{stored.key}.{name}", content)
                samples += 1
        if samples != len(copy.ordinals):
            raise UserError(f"{copy.source} changed while it was repaired; run again")
        temporary.replace(copy.target)
    finally:
        temporary.unlink(missing_ok=True)
    return samples


def _clean_members(stored: StoredSample) -> dict[str, bytes]:
    """The sidecar and the audio that it names; the sidecar's own bytes unless a duration is put right."""
    sidecar = json.loads(stored.members[SIDECAR])
    named = [turn["audio"] for turn in sidecar["turns"] if turn.get("audio") is not None]
    corrected = [_correct(turn, stored) for turn in sidecar["turns"]]
    text = json.dumps(sidecar, ensure_ascii=False).encode() if any(corrected) else stored.members[SIDECAR]
    return {SIDECAR: text, **{name: stored.members[name] for name in named}}


def _correct(turn: dict[str, Any], stored: StoredSample) -> bool:
    """Put a turn's duration right, in place. Returns whether it was wrong."""
    if turn.get("audio") is None or turn.get("seconds") is None:
        return False
    found = len(decode_waveform(stored.members[turn["audio"]], max_seconds=float("inf"))) / SAMPLE_RATE
    if abs(found - turn["seconds"]) <= _TOLERANCE:
        return False
    turn["seconds"] = round(found, 4)
    return True
