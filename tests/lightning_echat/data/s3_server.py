"""A server on this machine that speaks as much of S3 as reading shards takes, over the files of a folder."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class S3Server(ThreadingHTTPServer):
    """One bucket for each folder in `folder`.

    Attributes:
        failures: How many of the next reads of an object are answered by 500.
        reads: Keys of the objects that were read, with the range asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.failures = 0
        self.reads: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: S3Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def _serve(self, *, with_body: bool) -> None:
        address = urlsplit(self.path)
        bucket, _, key = unquote(address.path).lstrip("/").partition("/")
        if not key:
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            self._answer(200, self._listing(bucket, query), {"Content-Type": "application/xml"})
            return
        path = self.server.folder / bucket / key
        if not path.is_file():
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>" if with_body else b"", {})
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{len(data)}-{path.stat().st_mtime_ns}"', "Last-Modified": self.date_time_string(0)}
        if not with_body:
            self._answer(200, b"", headers, length=len(data))
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        self.server.reads.append((key, asked[0] if asked else ""))
        if self.server.failures:
            self.server.failures -= 1
            self._answer(500, b"<Error><Code>InternalError</Code></Error>", {})
        elif asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._answer(206, data[start : end + 1], headers)
        else:
            self._answer(200, data, headers)

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

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving_s3(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
