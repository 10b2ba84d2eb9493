"""A local server that speaks OpenAI's chat protocol, well or badly, as its script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


def completion(content: str | None, *, tokens: int = 10) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"total_tokens": tokens},
    }


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.send_response(status)
    for name, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def says(content: str | None, *, tokens: int = 10) -> Behaviour:
    return lambda handler, _: send(handler, 200, json.dumps(completion(content, tokens=tokens)).encode())


def refuses(status: int, text: str = "", **headers: str) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: send(handler, status, json.dumps({"error": {"message": text}}).encode(), named)


def breaks_json(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    send(handler, 200, b'{"choices": [{"mess')


def truncates(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
    body = json.dumps(completion("{}")).encode()
    send(handler, 200, body[: len(body) // 2], {"Content-Length": str(len(body))})
    handler.close_connection = True


def is_slow(seconds: float) -> Behaviour:
    def wait(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        time.sleep(seconds)
        send(handler, 200, json.dumps(completion("late")).encode())

    return wait


class ChatServer:
    """Answers by `script` in turn, then always by `then`.

    Attributes:
        bodies: Requests as they came.
        times: When.
        authorizations: Their Authorization headers.
        most_at_once: Requests under way at the same time, at most.
    """

    def __init__(self, script: list[Behaviour] | None = None, *, then: Behaviour) -> None:
        self.script = list(script or [])
        self.then = then
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.authorizations: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> ChatServer:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.bodies.append(body)
                    server.times.append(time.monotonic())
                    server.authorizations.append(self.headers.get("Authorization"))
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                    behaviour = server.script.pop(0) if server.script else server.then
                if self.path != "/v1/chat/completions":
                    behaviour = refuses(404, f"no {self.path}")
                try:
                    behaviour(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server._lock:
                        server._now -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"
