"""Local copies of remote shards, in a folder of limited size that all processes of a machine share."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from lightning_echat.data.remote import ResumingFile, buffered

_PARTIAL = ".partial"
_LOCKS = "locks"


def open_cached(url: str, remote: ResumingFile, *, folder: Path, limit: int) -> IO[bytes] | None:
    """The local copy of a remote file, made now where there is none. None where the file is larger than the cache.

    The name of a copy holds what the server says of the content, so a rewritten shard is another file. A copy that is
    being read may be removed by another process: its bytes stay until it is closed.

    Args:
        url: Its address.
        remote: Connected; closed when this returns a file.
        folder: The cache.
        limit: Bytes that the folder may hold.
    """
    assert remote.identity is not None
    size = remote.identity.size
    if size is None or size > limit:
        return None
    copy = folder / _name(url, f"{size}/{remote.identity.tag}")
    (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = copy.open("rb")
            # The time of last use decides which copy makes room first.
            os.utime(file.fileno())
            remote.close()
            return file
        except FileNotFoundError:
            with _lock(folder, copy.name):
                if not copy.exists():
                    _download(remote, copy, size=size, limit=limit)


def _name(url: str, identity: str) -> str:
    digest = hashlib.sha256(f"{url}\n{identity}".encode()).hexdigest()[:24]
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", url.rpartition("/")[2].partition("?")[0])[-60:]
    return f"{digest}-{plain.lstrip('.')}"


def _lock(folder: Path, name: str, *, timeout: float = -1) -> FileLock:
    return FileLock(folder / _LOCKS / f"{name}.lock", timeout=timeout)


def _download(remote: ResumingFile, copy: Path, *, size: int, limit: int) -> None:
    partial = copy.with_name(copy.name + _PARTIAL)
    with _lock(copy.parent, "all"):
        _make_room(copy.parent, size, limit)
        # At its full size from the start, so that others see the room as taken.
        with partial.open("wb") as file:
            file.truncate(size)
    try:
        remote.seek(0)
        source = buffered(remote)
        with partial.open("r+b") as file:
            shutil.copyfileobj(source, file, 2**20)
        source.detach()
        partial.replace(copy)
        # What was in the making made no room for others; now that it is whole the oldest goes.
        with _lock(copy.parent, "all"):
            _make_room(copy.parent, 0, limit)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(folder: Path, size: int, limit: int) -> None:
    """Remove what was not used for longest until `size` more bytes fit. Copies in the making stay."""
    held = sorted(((path, path.stat()) for path in folder.iterdir() if path.is_file()), key=lambda e: e[1].st_mtime_ns)
    total = sum(stat.st_size for _, stat in held) + size
    for path, stat in held:
        if total <= limit:
            return
        if path.suffix != _PARTIAL or _is_abandoned(path):
            path.unlink(missing_ok=True)
            total -= stat.st_size


def _is_abandoned(partial: Path) -> bool:
    """Whether the process that was making this copy is gone."""
    try:
        with _lock(partial.parent, partial.name.removesuffix(_PARTIAL), timeout=0):
            return True
    except Timeout:
        return False
