"""A real HTTP server on this machine that serves a folder, and fails as it is told."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

from tests.local_server import LocalServer, QuietHandler


class FaultyServer(LocalServer):
    """Attributes say how it fails; it serves as it should where they are left alone.

    Attributes:
        faults: What goes wrong with the next answers, one each: "500", "refuse" (closed before an answer), "drop"
            (closed in the middle of the body), "stall" (silent in the middle), "short" (half of the bytes it promised);
            "" for none.
        every: Bytes after which each answer is dropped; 0 for never.
        ranges: Whether it knows range requests.
        requests: Path -> how often it was asked for.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.every = 0
        self.ranges = True
        self.requests: Counter[str] = Counter()
        self.tag = "one"


class _Handler(QuietHandler):
    server: FaultyServer

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
            self.answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
            return
        self._head(len(data), start)
        self._send(data[start:], fault)

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

    def _send(self, data: bytes, fault: str) -> None:
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
