"""Shards behind a URL, read as if they were local: a read that fails goes on where it stopped.

http and https are read by requests, a range at a time. Every other scheme (s3, gs, memory, …) is fsspec's.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Protocol

import fsspec
import requests
import urllib3

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter

READ_AGAIN = "read again"
"""What a failure is counted as that was overcome."""
_LONGEST_WAIT = 60.0
_BUFFER = 2**20
_GONE = (401, 403, 404, 410)
_TRANSIENT = (urllib3.exceptions.HTTPError, OSError, EOFError)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True)
class ShardAccess:
    """How shards behind a URL are reached.

    Attributes:
        timeout: Seconds without a byte after which a connection is given up.
        attempts: Failures in a row, without a byte between them, after which the run stops.
        backoff: Seconds to wait after the first failure; doubled after each further one, up to a minute.
        cache: Folder in which shards are kept once read, shared by all processes of a machine; null for none.
        cache_gigabytes: Size of that folder; what was not used for longest makes room.
    """

    timeout: float = 30.0
    attempts: int = 8
    backoff: float = 0.5
    cache: str | None = None
    cache_gigabytes: float = 50.0

    def __post_init__(self) -> None:
        """Refuse what could never read a byte."""
        for name in ("timeout", "attempts", "cache_gigabytes"):
            if not getattr(self, name) > 0:
                raise UserError(f"access.{name} is {getattr(self, name)}; it must be positive")
        if self.backoff < 0:
            raise UserError(f"access.backoff is {self.backoff}; it cannot be negative")


LOCAL = ShardAccess()
"""The defaults: no cache."""


class ShardChanged(OSError):
    """What stands at the address is not what was there when reading began."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells two contents at one address apart: size in bytes, None where unknown, and the server's own tag."""

    size: int | None
    tag: str


class Connection(Protocol):
    """Bytes from a position on. `identity` is that of the whole file."""

    identity: Identity

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, as many as are there; none at the end."""
        ...

    def close(self) -> None:
        """Give the connection up."""
        ...


def is_url(path: str) -> bool:
    """Whether the path names something behind a scheme, as in https://… or s3://…."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path) is not None


def open_url(url: str, *, counter: SkipCounter, access: ShardAccess) -> ResumingFile:
    """What is behind a URL, as a raw file that is connected already.

    Raises:
        FileNotFoundError, PermissionError: The server says that there is no such file, or that it is not for us.
        UserError: The server did not answer, or there is no way to reach its scheme.
    """
    connect = _http(url, access) if url.partition(":")[0].lower() in ("http", "https") else _filesystem(url)
    file = ResumingFile(url, connect=connect, counter=counter, access=access)
    file.connect()
    return file


def read_url(url: str, *, counter: SkipCounter, access: ShardAccess) -> bytes:
    """All bytes of a small file; raises as `open_url` does."""
    with buffered(open_url(url, counter=counter, access=access)) as file:
        return file.read()


def glob_url(pattern: str) -> list[str]:
    """URLs that a pattern of a listable scheme matches, sorted.

    Raises:
        UserError: The scheme cannot be listed.
    """
    if pattern.partition(":")[0].lower() in ("http", "https"):
        raise UserError(f"shards {pattern!r}: http cannot be listed; use a brace pattern or a list file")
    system, path = _file_system(pattern)
    try:
        return sorted(system.unstrip_protocol(str(found)) for found in system.glob(path))
    except OSError as error:
        raise UserError(f"shards {pattern!r}: {error}") from error


def buffered(file: ResumingFile) -> io.BufferedReader:
    """The file with a buffer of a size that suits networks."""
    return io.BufferedReader(file, _BUFFER)


class ResumingFile(io.RawIOBase):
    """A remote file that connects again, from where it stands, whenever a read fails.

    Nothing is handed out twice and nothing left out, or an error says so.

    Args:
        name: What reports call it.
        connect: Opens a connection that yields bytes from a position on.
        counter: Counts failures that were overcome, as `READ_AGAIN`.
        access: How patient to be.
    """

    def __init__(
        self, name: str, *, connect: Callable[[int], Connection], counter: SkipCounter, access: ShardAccess
    ) -> None:
        super().__init__()
        self._name = name
        self._connect = connect
        self._counter = counter
        self._access = access
        self._position = 0
        self._connection: Connection | None = None
        self.identity: Identity | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: the next read connects at the new position."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; costs a new connection when something is read next."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("a remote file is read from its beginning")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target != self._position:
            self._drop()
            self._position = target
        return target

    def connect(self) -> None:
        """Connect now, so that a file that is not there is found out before anything is read."""
        self._patiently(lambda connection: connection)

    def readinto(self, buffer: Any, /) -> int:
        """Fill a part of `buffer`; 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        data = self._patiently(lambda connection: self._read(connection, len(view)))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Give the connection up."""
        self._drop()
        super().close()

    def _read(self, connection: Connection, size: int) -> bytes:
        data = connection.read(size)
        whole = connection.identity.size
        if not data and whole is not None and self._position < whole:
            raise EOFError(f"ended at byte {self._position} of {whole}")
        return data

    def _patiently(self, action: Callable[[Connection], Any]) -> Any:
        """The action on a connection, tried again after failures that may pass."""
        for attempt in range(1, self._access.attempts + 1):
            try:
                return action(self._connected())
            except (ShardChanged, *_PERMANENT):
                self._drop()
                raise
            except _TRANSIENT as error:
                self._drop()
                reason = " ".join(str(error).split()) or type(error).__name__
                if attempt == self._access.attempts:
                    raise UserError(
                        f"{self._name}: no answer after {attempt} attempts ({reason}); "
                        "run again when the server is back, or raise access.attempts"
                    ) from error
                self._counter.notice(READ_AGAIN, shard=self._name, detail=f"at byte {self._position}: {reason}")
                time.sleep(min(self._access.backoff * 2 ** (attempt - 1), _LONGEST_WAIT))

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._connect(self._position)
            if self.identity not in (None, connection.identity):
                connection.close()
                raise ShardChanged(f"{self._name} was rewritten while it was read")
            self._connection, self.identity = connection, connection.identity
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _HttpConnection:
    """One response, from a position on."""

    def __init__(self, url: str, position: int, timeout: float) -> None:
        headers = {"Range": f"bytes={position}-", "Accept-Encoding": "identity"}
        try:
            self._response = requests.get(url, headers=headers, stream=True, timeout=timeout)
        except requests.exceptions.InvalidURL as error:
            raise UserError(f"shard {url!r}: {error}") from error
        try:
            self.identity = self._checked(url, position)
        except BaseException:
            self.close()
            raise

    def _checked(self, url: str, position: int) -> Identity:
        """Read status and headers; leaves the response at `position`."""
        response, headers = self._response, self._response.headers
        if response.status_code in _GONE:
            raise FileNotFoundError(2, f"the server answers {response.status_code}", url)
        tag = headers.get("ETag") or headers.get("Last-Modified") or ""
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
            if found is None or int(found[1]) != position:
                raise OSError(f"asked for bytes from {position} on, got {headers.get('Content-Range')!r}")
            return Identity(int(found[2]) if found[2] != "*" else None, tag)
        if response.status_code == 416:
            size = headers.get("Content-Range", "").rpartition("/")[2]
            # A tag is not always sent along with this answer.
            raise ShardChanged(f"{url} ends before byte {position}" + (f", after {size} bytes" if size else ""))
        if response.status_code != 200:
            raise OSError(f"the server answers {response.status_code}")
        length = headers.get("Content-Length")
        # This server knows no ranges.
        while position:
            skipped = len(self.read(min(position, _BUFFER)))
            if not skipped:
                raise EOFError(f"ended {position} bytes before the place to go on from")
            position -= skipped
        return Identity(int(length) if length is not None else None, tag)

    def read(self, size: int, /) -> bytes:
        # What has arrived, rather than all of `size`: whoever drops a connection often would never get that far.
        return self._response.raw.read1(size)

    def close(self) -> None:
        self._response.close()


def _http(url: str, access: ShardAccess) -> Callable[[int], Connection]:
    return lambda position: _HttpConnection(url, position, access.timeout)


class _FileSystemConnection:
    """An open file of fsspec, at a position."""

    def __init__(self, system: Any, path: str, position: int) -> None:
        info = system.info(path)
        tag = next(
            (str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified", "created") if name in info), ""
        )
        self.identity = Identity(info.get("size"), tag)
        self._file: IO[bytes] = system.open(path, "rb")
        self._file.seek(position)

    def read(self, size: int, /) -> bytes:
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


def _filesystem(url: str) -> Callable[[int], Connection]:
    system, path = _file_system(url)

    def connect(position: int) -> Connection:
        # What an earlier listing said may be out of date.
        system.invalidate_cache()
        return _FileSystemConnection(system, path, position)

    return connect


def _file_system(url: str) -> tuple[Any, str]:
    scheme = url.partition(":")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = "pip install 'lightning-echat[s3]'" if scheme == "s3" else "install what fsspec asks for"
        raise UserError(f"{url}: {error}; {extra}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; fsspec knows no scheme {scheme!r}") from error
