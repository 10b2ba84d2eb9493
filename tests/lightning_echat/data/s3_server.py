"""A server on this machine that speaks as much of S3 as reading shards takes, over the files of a folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.local_server import LocalServer, QuietHandler


class S3Server(LocalServer):
    """One bucket for each folder in `folder`.

    Attributes:
        failures: How many of the next reads of an object are answered by 500.
        reads: Keys of the objects that were read, with the range asked for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.failures = 0
        self.reads: list[tuple[str, str]] = []


class _Handler(QuietHandler):
    server: S3Server

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        address = urlsplit(self.path)
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        if not key:
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            self.answer(200, self._listing(bucket, query), {"Content-Type": "application/xml"})
            return
        path = self.server.folder / bucket / key
        if not path.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>" if with_body else b"")
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{len(data)}-{path.stat().st_mtime_ns}"', "Last-Modified": self.date_time_string(0)}
        if not with_body:
            self.answer(200, headers={**headers, "Content-Length": str(len(data))})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.server.reads.append((key, asked[0] if asked else ""))
        if self.server.failures:
            self.server.failures -= 1
            self.answer(500, b"<Error><Code>InternalError</Code></Error>")
        elif asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.answer(206, data[start : end + 1], headers)
        else:
            self.answer(200, data, headers)

    def _listing(self, bucket: str, query: dict[str, str]) -> bytes:
        """ListObjectsV2 of everything that begins with a prefix, folders in one where there is a delimiter."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        root = self.server.folder / bucket
        keys = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        keys = [key for key in keys if key.startswith(prefix)]
        folders: set[str] = set()
        if delimiter:
            split = {key: key[len(prefix) :].partition(delimiter) for key in keys}
            folders = {prefix + first + delimiter for first, found, _ in split.values() if found}
            keys = [key for key in keys if not split[key][1]]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{(root / key).stat().st_size}</Size><ETag>&quot;e&quot;</ETag>"
            "<LastModified>2000-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for key in keys
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        counted = f"<KeyCount>{len(keys) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult><Name>{bucket}</Name>{counted}{entries}{common}</ListBucketResult>".encode()
