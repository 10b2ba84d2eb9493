"""From patterns to shards, from shards to the samples stored in them, and who reads which shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import IO

from braceexpand import braceexpand

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.reference_data import is_reference, list_units
from lightning_echat.data.reference_formats import read_unit
from lightning_echat.data.remote import LOCAL, ShardAccess, buffered, glob_url, is_url, open_url, read_url
from lightning_echat.data.shard_cache import open_cached
from lightning_echat.data.shard_index import FOLDER_INDEX, ShardIndex, find_index, reject_index
from lightning_echat.data.tar_samples import StoredSample, named_members, samples_in


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPart:
    """The samples of a shard whose index leaves the remainder `part` divided by `parts`."""

    path: str
    part: int = 0
    parts: int = 1


def below(root: str, pattern: str) -> str:
    """The pattern as seen from `root`, a folder or a URL; absolute patterns and URLs stay."""
    if is_url(pattern) or not root:
        return pattern
    return f"{root.rstrip('/')}/{pattern}" if is_url(root) else str(Path(root) / pattern)


def expand_shards(patterns: Sequence[str], *, access: ShardAccess = LOCAL) -> list[str]:
    """Shard paths and URLs that the patterns name, in order, each once.

    A pattern is a tar file, a glob, a brace pattern (`train-{000..031}.tar`), a list file (.txt or .list) of patterns
    one a line, relative to itself, a folder with `index.json`, or of tar files, or a description of the public
    implementation's data (`*.reference.yaml`). Each but the last may be a URL; a folder's ends in a slash, and http has
    no globs.

    Raises:
        UserError: A pattern matches nothing.
    """
    if not patterns:
        raise UserError("no shards given; name tar files, a glob, a list file or a folder with index.json")
    found = [path for pattern in patterns for path in _expand(pattern, access)]
    return list(dict.fromkeys(found))


def _expand(pattern: str, access: ShardAccess) -> list[str]:
    expand = _expand_url if is_url(pattern) else _expand_path
    return [shard for name in _braces(pattern) for shard in expand(name, pattern, access)]


def _expand_path(name: str, pattern: str, access: ShardAccess) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file() and is_reference(name):
        return list_units(path)
    if path.is_file():
        return _list(path.read_text(encoding="utf-8"), str(path), access) if _is_list(name) else [str(path)]
    matches = [found for found in sorted(glob(str(path))) if _may_be_shard(found)]  # noqa: PTH207  # takes absolute ones
    if not matches:
        raise UserError(_nothing_matches(pattern, path))
    return matches


def _expand_url(name: str, pattern: str, access: ShardAccess) -> list[str]:
    if _is_list(name):
        return _list(_fetch(name, access), name, access)
    if name.endswith("/"):
        index = name + FOLDER_INDEX
        return [name + file for file in _listed_files(_fetch(index, access), index)]
    if not any(wildcard in name for wildcard in "*["):
        return [name]
    matches = [found for found in glob_url(name) if _may_be_shard(found)]
    if not matches:
        raise UserError(f"shards {pattern!r} match nothing")
    return matches


def _fetch(url: str, access: ShardAccess) -> str:
    try:
        return read_url(url, counter=SkipCounter(), access=access).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {url}: {error}") from error


def _braces(pattern: str) -> list[str]:
    # A real path may hold a brace or be no valid brace pattern; then it is taken as it is.
    if "{" not in pattern or Path(pattern).exists():
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"shard pattern {pattern!r}: {error}") from error


def _is_list(name: str) -> bool:
    return name.partition("?")[0].endswith((".txt", ".list")) if is_url(name) else name.endswith((".txt", ".list"))


def _may_be_shard(name: str) -> bool:
    """Whether a glob means this file too: not what stands beside shards, indices and files in the making."""
    return not name.endswith((".json", ".jsonl", ".tmp", ".txt", ".list"))


def _folder(folder: Path) -> list[str]:
    index = folder / FOLDER_INDEX
    if not index.is_file():
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        if not tars:
            raise UserError(f"folder {folder} holds neither {FOLDER_INDEX} nor tar files; echat data pack writes both")
        return tars
    paths = [folder / name for name in _listed_files(index.read_text(encoding="utf-8"), str(index))]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{index} lists {path.name}, which is not in the folder; restore it or write the index again"
            )
    return [str(path) for path in paths]


def _listed_files(text: str, index: str) -> list[str]:
    """The file names in a folder's index."""
    try:
        names = [str(entry["file"]) for entry in json.loads(text)["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no shard index ({error!r}); write it again with echat data verify") from error
    if not names:
        raise UserError(f"{index} lists no shards")
    if outside := [name for name in names if "/" in name or name in ("", ".", "..")]:
        raise UserError(f"{index} lists {outside[0]!r}, which is no file of its folder")
    return names


def _list(text: str, path: str, access: ShardAccess) -> list[str]:
    """The shards that a list file names."""
    lines = [line.strip() for line in text.splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"shard list {path} is empty")
    folder = path.rpartition("/")[0]
    return [shard for entry in entries for shard in _expand(below(folder, entry), access)]


def _nothing_matches(pattern: str, path: Path) -> str:
    where = f" (as {path})" if str(path) != pattern else ""
    if not path.parent.is_dir():
        return f"shards {pattern!r}{where}: there is no folder {path.parent}"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"shards {pattern!r}{where} match nothing in {path.parent}{hint}"


def read_shard(
    part: ShardPart, *, start: int = 0, counter: SkipCounter, access: ShardAccess = LOCAL
) -> Iterator[StoredSample]:
    """The samples of a shard in order, from place `start` on. Damage ends the shard and is counted; it never raises.

    With an index the reader seeks to `start`, without one it reads past what comes before.

    Args:
        part: Which shard, and which of its samples.
        start: Place in the shard, over all samples found there whichever part they belong to.
        counter: Counts what is odd.
        access: How shards that are not local files are reached.

    Raises:
        UserError: A server did not answer however often it was asked.
    """
    for sample in _samples_from(part.path, start, counter, access):
        if sample.ordinal >= start and sample.ordinal % part.parts == part.part:
            yield sample


def read_samples(
    shard: str, ordinals: Sequence[int], *, counter: SkipCounter, access: ShardAccess = LOCAL
) -> Iterator[StoredSample]:
    """Certain samples of a shard, in the order of their places. What the shard no longer holds is left out.

    With an index each is read alone, without one the shard is read up to the last.
    """
    wanted = sorted(set(ordinals))
    samples: Iterator[StoredSample] = iter(())
    last = -2
    for place in wanted:
        # With an index each stretch of neighbours is sought; without one the same stream goes on.
        if last < 0 or (place > last + 1 and find_index(shard, counter=SkipCounter(), access=access) is not None):
            samples = read_shard(ShardPart(path=shard), start=place, counter=counter, access=access)
        sample = next((sample for sample in samples if sample.ordinal == place), None)
        if sample is None:
            return
        yield sample
        last = place


def _samples_from(shard: str, start: int, counter: SkipCounter, access: ShardAccess) -> Iterator[StoredSample]:
    """The samples of a shard, the first of them `start` where an index says where that is, else 0."""
    if is_reference(shard):
        for row in read_unit(shard, counter=counter, tar_members=named_members):
            yield StoredSample(key=row.key, shard=shard, ordinal=row.index, members=row.members)
        return
    index = find_index(shard, counter=counter, access=access) if start else None
    if index is not None:
        if start >= len(index.samples):
            return
        yield from _seek(shard, start, index, counter, access)
        return
    yield from _stream(shard, 0, 0, counter, access)


def _seek(
    shard: str, start: int, index: ShardIndex, counter: SkipCounter, access: ShardAccess
) -> Iterator[StoredSample]:
    """The samples from `start` on; from 0 on where the index proves wrong."""
    entry = index.samples[start]
    first = next(_stream(shard, start, entry.offset, SkipCounter(), access), None)
    if first is not None and first.key == entry.key:
        yield from _stream(shard, start, entry.offset, counter, access)
        return
    reject_index(shard, key=entry.key, found=first.key if first else "", counter=counter)
    yield from _stream(shard, 0, 0, counter, access)


def _stream(shard: str, ordinal: int, offset: int, counter: SkipCounter, access: ShardAccess) -> Iterator[StoredSample]:
    """The samples from byte `offset` on, at which the one with place `ordinal` begins."""
    try:
        file = _open(shard, counter, access)
    except OSError as error:
        reason = "missing shard" if isinstance(error, FileNotFoundError) else "damaged shard"
        counter.notice(reason, shard=shard, detail=error.strerror or str(error))
        return
    with closing(file):
        file.seek(offset)
        yield from samples_in(file, shard=shard, counter=counter, ordinal=ordinal, offset=offset)


def _open(shard: str, counter: SkipCounter, access: ShardAccess) -> IO[bytes]:
    if not is_url(shard):
        return Path(shard).open("rb")
    remote = open_url(shard, counter=counter, access=access)
    if access.cache is not None:
        limit = round(access.cache_gigabytes * 1e9)
        cached = open_cached(shard, remote, folder=Path(access.cache), limit=limit)
        if cached is not None:
            return cached
        counter.notice("shard larger than the cache", shard=shard)
    return buffered(remote)
