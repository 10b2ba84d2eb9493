"""A local server that speaks OpenAI's chat protocol, well or badly, as its script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.local_server import LocalServer, QuietHandler

Behaviour = Callable[[QuietHandler, dict[str, Any]], None]


def completion(content: str | None, *, tokens: int = 10) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"total_tokens": tokens},
    }


def send(handler: QuietHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    handler.answer(status, body, {"Content-Type": "application/json", **(headers or {})})


def says(content: str | None, *, tokens: int = 10) -> Behaviour:
    return lambda handler, _: send(handler, 200, json.dumps(completion(content, tokens=tokens)).encode())


def refuses(status: int, text: str = "", **headers: str) -> Behaviour:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, _: send(handler, status, json.dumps({"error": {"message": text}}).encode(), named)


def breaks_json(handler: QuietHandler, _: dict[str, Any]) -> None:
    send(handler, 200, b'{"choices": [{"mess')


def truncates(handler: QuietHandler, _: dict[str, Any]) -> None:
    body = json.dumps(completion("{}")).encode()
    send(handler, 200, body[: len(body) // 2], {"Content-Length": str(len(body))})
    handler.close_connection = True


def is_slow(seconds: float) -> Behaviour:
    def wait(handler: QuietHandler, _: dict[str, Any]) -> None:
        time.sleep(seconds)
        send(handler, 200, json.dumps(completion("late")).encode())

    return wait


class ChatServer(LocalServer):
    """Answers by `script` in turn, then always by `then`.

    Attributes:
        bodies: Requests as they came.
        times: When.
        authorizations: Their Authorization headers.
        most_at_once: Requests under way at the same time, at most.
    """

    def __init__(self, script: list[Behaviour] | None = None, *, then: Behaviour) -> None:
        super().__init__(_Handler)
        self.script = list(script or [])
        self.then = then
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.authorizations: list[str | None] = []
        self.most_at_once = 0
        self.now = 0
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


class _Handler(QuietHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.body())
        with server.lock:
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.authorizations.append(self.headers.get("Authorization"))
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            behaviour = server.script.pop(0) if server.script else server.then
        if self.path != "/v1/chat/completions":
            behaviour = refuses(404, f"no {self.path}")
        try:
            behaviour(self, body)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.now -= 1
