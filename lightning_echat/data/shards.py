"""From patterns to shards, and from shards to the dialogues stored in them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.reference_data import is_reference, list_units
from lightning_echat.data.reference_formats import read_unit

INDEX_NAME = "index.json"
_MAX_MEMBER_BYTES = 256 * 2**20
"""A larger member is no utterance, and would be held in memory as a whole."""
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPart:
    """The samples of a shard whose index leaves the remainder `part` divided by `parts`."""

    path: str
    part: int = 0
    parts: int = 1


@dataclass(slots=True, kw_only=True)
class StoredDialogue:
    """The members of one key as they stand in the tar: name after the key -> bytes; `ordinal` is its place there."""

    key: str
    shard: str
    ordinal: int
    members: Mapping[str, bytes]


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Shard paths that the patterns name, in order, each once.

    A pattern is a tar file, a glob, a brace pattern (`train-{000..031}.tar`), a text file that lists patterns one a
    line (relative to itself), a folder with `index.json`, or of tar files, or a description of the public
    implementation's data (`*.reference.yaml`).

    Raises:
        UserError: A pattern matches nothing.
    """
    if not patterns:
        raise UserError("no shards given; name tar files, a glob, a list file or a folder with index.json")
    found = [path for pattern in patterns for path in _expand(pattern)]
    return list(dict.fromkeys(found))


def _expand(pattern: str) -> list[str]:
    paths: list[str] = []
    for name in _braces(pattern):
        path = Path(name).expanduser()
        if path.is_dir():
            paths += _folder(path)
        elif path.is_file() and is_reference(str(path)):
            paths += list_units(path)
        elif path.is_file():
            paths += [str(path)] if _is_tar(path) else _list_file(path)
        else:
            matches = sorted(glob(str(path)))  # noqa: PTH207  # Path.glob takes no absolute pattern
            if not matches:
                raise UserError(_nothing_matches(pattern, path))
            paths += matches
    return paths


def _braces(pattern: str) -> list[str]:
    # A real path may hold a brace or be no valid brace pattern; then it is taken as it is.
    if "{" not in pattern or Path(pattern).exists():
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"shard pattern {pattern!r}: {error}") from error


def _is_tar(path: Path) -> bool:
    return path.suffix != ".txt" and path.suffix != ".list"


def _folder(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if not index.is_file():
        tars = sorted(str(path) for path in folder.glob("*.tar"))
        if not tars:
            raise UserError(f"folder {folder} holds neither {INDEX_NAME} nor tar files; echat data pack writes both")
        return tars
    try:
        names = [entry["file"] for entry in json.loads(index.read_text(encoding="utf-8"))["shards"]]
        paths = [folder / name for name in names]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no shard index ({error!r}); write it again with echat data pack") from error
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{index} lists {path.name}, which is not in the folder; restore it or write the index again"
            )
    if not paths:
        raise UserError(f"{index} lists no shards")
    return [str(path) for path in paths]


def _list_file(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"shard list {path} is empty")
    return [shard for entry in entries for shard in _expand(str(path.parent / entry))]


def _nothing_matches(pattern: str, path: Path) -> str:
    where = f" (as {path})" if str(path) != pattern else ""
    if not path.parent.is_dir():
        return f"shards {pattern!r}{where}: there is no folder {path.parent}"
    near = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"shards {pattern!r}{where} match nothing in {path.parent}{hint}"


def read_shard(part: ShardPart, *, start: int = 0, counter: SkipCounter) -> Iterator[StoredDialogue]:
    """The dialogues of a shard in order, from place `start` on. Damage ends the shard and is counted; it never raises.

    Reading is sequential, so any file-like source can stand behind it. Costs about 0.4 ms a sample.
    """
    if is_reference(part.path):
        for row in read_unit(part.path, counter=counter, tar_members=_named_members):
            if row.index >= start and row.index % part.parts == part.part:
                yield StoredDialogue(key=row.key, shard=part.path, ordinal=row.index, members=row.members)
        return

    def duplicate(error: Exception) -> bool:
        counter.notice("duplicate member", shard=part.path, detail=str(error.args[0]))
        return True

    def key_and_suffix(name: str) -> tuple[str | None, str | None]:
        key, suffix = base_plus_ext(name.removeprefix("./"))
        if key is None:
            counter.notice("member without key", shard=part.path, key=name)
        return key, suffix

    groups = group_by_keys(_members(part.path, counter), keys=_any(key_and_suffix), lcase=False, handler=duplicate)
    for ordinal, group in enumerate(groups):
        if ordinal >= start and ordinal % part.parts == part.part:
            members = {name: value for name, value in group.items() if not name.startswith("__")}
            yield StoredDialogue(key=group["__key__"], shard=part.path, ordinal=ordinal, members=members)


def read_samples(shard: str, ordinals: Sequence[int], *, counter: SkipCounter) -> Iterator[StoredDialogue]:
    """Certain dialogues of a shard, in the order of their places. What the shard no longer holds is left out."""
    wanted = set(ordinals)
    last = max(wanted, default=-1)
    for stored in read_shard(ShardPart(path=shard), counter=counter) if wanted else ():
        if stored.ordinal in wanted:
            yield stored
        if stored.ordinal >= last:
            return


def _any(function: Callable[[str], tuple[str | None, str | None]]) -> Any:
    # webdataset's annotation promises strings where its own code expects None too.
    return function


class _StrictTarInfo(tarfile.TarInfo):
    """Makes a damaged or missing header an error; tarfile alone takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _StrictTarInfo:
        return _strict_header(super().fromtarfile, tarfile)


def _strict_header(read: Callable[[tarfile.TarFile], Any], archive: tarfile.TarFile) -> Any:
    # These names are tarfile's own; they are not in its stubs.
    header_error, end = tarfile.HeaderError, tarfile.EOFHeaderError  # type: ignore[attr-defined]
    try:
        return read(archive)
    except end:
        raise
    except header_error as error:
        raise tarfile.ReadError(f"bad header ({error})") from error


def _members(path: str, counter: SkipCounter) -> Iterator[dict[str, Any]]:
    """Name and bytes of every file in a tar, as webdataset's grouping expects them."""
    try:
        with Path(path).open("rb") as file:
            yield from _members_of(file, path, counter)
    except _READ_ERRORS as error:
        counter.notice("damaged shard", shard=path, detail=str(error))


def _named_members(path: str, counter: SkipCounter) -> Iterator[tuple[str, bytes]]:
    return ((member["fname"], member["data"]) for member in _members(path, counter))


def _members_of(file: IO[bytes], path: str, counter: SkipCounter) -> Iterator[dict[str, Any]]:
    # webdataset's own reader ends a shard silently at a bad header, hence this one.
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictTarInfo) as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # keep memory flat: tarfile remembers every header
            if info.isdir():
                continue
            if not info.isreg() or info.size > _MAX_MEMBER_BYTES:
                counter.notice("unusable member", shard=path, key=info.name)
                continue
            extracted = archive.extractfile(info)
            assert extracted is not None
            yield {"fname": info.name, "data": extracted.read(), "__url__": path}
