"""A real HTTP server on this machine that serves a folder, and fails as it is told."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Attributes say how it fails; it serves as it should where they are left alone.

    Attributes:
        faults: What goes wrong with the next answers, one each: "500", "refuse" (closed before an answer), "drop"
            (closed in the middle of the body), "stall" (silent in the middle), "short" (half of the bytes it promised);
            "" for none.
        every: Bytes after which each answer is dropped; 0 for never.
        ranges: Whether it knows range requests.
        requests: Path -> how often it was asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.every = 0
        self.ranges = True
        self.requests: Counter[str] = Counter()
        self.tag = "one"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        server = self.server
        server.requests[self.path] += 1
        fault = server.faults.pop(0) if server.faults else ""
        path = server.folder / self.path.lstrip("/").partition("?")[0]
        if fault == "refuse":
            return
        if fault == "500" or not path.is_file():
            self.send_error(500 if fault else 404)
            return
        data = path.read_bytes()
        start = self._start(len(data))
        if start is None:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._head(len(data), start)
        self._body(data[start:], fault)

    def _start(self, size: int) -> int | None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            return 0
        return int(asked[1]) if int(asked[1]) < size else None

    def _head(self, size: int, start: int) -> None:
        self.send_response(206 if self.server.ranges else 200)
        if self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("ETag", f'"{self.server.tag}"')
        self.send_header("Content-Length", str(size - start))
        self.end_headers()

    def _body(self, data: bytes, fault: str) -> None:
        if self.server.every:
            data = data[: self.server.every]
        if fault:
            data = data[: len(data) // 2]
        try:
            self.wfile.write(data)
            self.wfile.flush()
            if fault == "stall":
                time.sleep(2.0)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
