"""Chat completions from any server that speaks OpenAI's protocol, recorded so that nothing is ever asked twice.

A request is known by the hash of what decides its answer (model, messages, sampling). Answers are appended to a file of
JSON lines as they come and are read from there the next time: a rerun costs nothing, and one that was killed goes on.
Plain HTTP by requests: one POST is all that is used, and retries, budget and record had to be our own anyway.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import requests
from rich.progress import Progress

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.chat_record import ChatAnswer, ChatRequest, end_torn_line, read_answers

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_BACK_OFF = 60.0
_LONGEST_WAIT = 600.0
"""Seconds that a server may ask to wait; one that asks for more is out for this run."""
_CONNECT_SECONDS = 10.0
_MESSAGE = 200
_HINTS = {
    "HTTP 400": "; keys of requests are added and taken away by the judge's argument request",
    "HTTP 401": "; is {key} set and right?",
    "HTTP 403": "; is {key} set and right?",
    "HTTP 404": "; base_url goes up to /v1, and model is the server's name for it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """A server and how it is treated.

    Attributes:
        base_url: Up to and including /v1.
        model: Its name on the server.
        api_key_env: Environment variable with the key; it is sent and never stored. Unset for servers without.
        temperature: Of sampling.
        max_reply_tokens: After which the server cuts an answer.
        concurrency: Requests under way at once.
        timeout: Seconds to wait for an answer.
        retries: Further attempts after one that failed for a reason that may pass.
        back_off: Seconds before the first retry, doubled for each further one; a Retry-After of the server counts.
        max_requests, max_tokens: Budget of one run, failed attempts included; 0 for none.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_reply_tokens: int = 512
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6
    back_off: float = 1.0
    max_requests: int = 0
    max_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what no server can be asked with."""
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url {self.base_url!r} is no http(s) address, for instance http://localhost:8000/v1")
        for name, least in (("concurrency", 1), ("retries", 0), ("max_requests", 0), ("max_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("timeout", "back_off", "max_reply_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be more than 0")


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """What became of one request: an answer, or the reason why there is none; and every failed attempt."""

    raw: dict[str, Any] | None = None
    failed: str = ""
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _BudgetSpent(Exception):
    """No further attempt may be made in this run."""


class _Stopped(Exception):
    """Somebody ended the run while this request was waiting."""


class ChatEndpoint:
    """Asks a server and keeps what it answers in a file.

    One object is one run: its budget is counted over all calls.

    Args:
        config: The server.
        record: The file of JSON lines. Every attempt is a line; those with `reply` are read back.
        facts: Stands in every line, for people.
    """

    def __init__(self, config: EndpointConfig, *, record: Path, facts: Mapping[str, Any]) -> None:
        self.config = config
        self.record = record
        self.facts = dict(facts)
        self.known: dict[str, ChatAnswer] = read_answers(record)
        self.attempts = 0
        self.tokens = 0
        self._lock = threading.Lock()
        self._sessions = threading.local()
        self._stopping = threading.Event()
        self._not_before = 0.0
        self._refusal = ""

    def answers(self, questions: Sequence[ChatRequest]) -> list[ChatAnswer]:
        """The answer to every question, asked or recorded.

        Raises:
            UserError: Some have none: refused, budget spent, or the server did not answer. The others are recorded.
        """
        missing = list({question.hash: question for question in questions if question.hash not in self.known}.values())
        if missing:
            self._ask(missing)
        return [self.known[question.hash] for question in questions]

    def _ask(self, missing: list[ChatRequest]) -> None:
        self._stopping.clear()
        self.record.parent.mkdir(parents=True, exist_ok=True)
        end_torn_line(self.record)
        failures: Counter[str] = Counter()
        done = 0
        with self.record.open("a", encoding="utf-8") as record, Progress(transient=True) as progress:
            task = progress.add_task(f"{self.config.model}", total=len(missing))
            try:
                for question, outcome in self._outcomes(missing):
                    self._note(record, question, outcome)
                    progress.advance(task)
                    if outcome.raw is not None:
                        done += 1
                    else:
                        failures[outcome.failed] += 1
            except KeyboardInterrupt:
                sys.stderr.write(f"\nstopped; {self._kept(done, len(missing))}; the same command goes on\n")
                raise
        if done < len(missing):
            self._explain(failures, done=done, total=len(missing))

    def _outcomes(self, missing: list[ChatRequest]) -> Iterator[tuple[ChatRequest, _Outcome]]:
        """Outcomes as they come; ends early when the budget is spent or the server seems to be gone."""
        waiting = iter(missing)
        lost_in_a_row = 0
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            running: dict[Future[_Outcome], ChatRequest] = {}
            try:
                while True:
                    while len(running) < self.config.concurrency and not self._stopping.is_set():
                        if (question := next(waiting, None)) is None:
                            break
                        running[pool.submit(self._complete, question)] = question
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        question, outcome = running.pop(future), future.result()
                        lost_in_a_row = 0 if outcome.raw is not None else lost_in_a_row + 1
                        yield question, outcome
                        if lost_in_a_row >= 2 * self.config.concurrency or outcome.failed in ("budget", "refused"):
                            self._stopping.set()
            finally:
                self._stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _complete(self, question: ChatRequest) -> _Outcome:
        """One question with its retries, in a thread of its own."""
        outcome = _Outcome()
        started = time.monotonic()
        for attempt in range(self.config.retries + 1):
            try:
                wanted = self._attempt(question, outcome)
            except _BudgetSpent:
                outcome.failed = "budget"
                break
            except _Stopped:
                outcome.failed = outcome.failed or "stopped"
                break
            if wanted is None:
                break
            if wanted > _LONGEST_WAIT:
                outcome.failed += f", asks to wait {wanted:.0f} s"
                break
            back_off = min(self.config.back_off * 2**attempt, _LONGEST_BACK_OFF) * random.uniform(0.5, 1.0)
            if attempt < self.config.retries:
                self._hold(max(wanted, back_off), everybody=wanted > 0)
                if self._stopping.wait(max(wanted, back_off)):
                    break
        outcome.seconds = round(time.monotonic() - started, 3)
        return outcome

    def _attempt(self, question: ChatRequest, outcome: _Outcome) -> float | None:
        """One POST. None when the question is settled, else the seconds that the server asks to wait, 0 for none."""
        self._take_from_budget()
        try:
            response = self._session().post(
                f"{self.config.base_url.rstrip('/')}/chat/completions",
                json=dict(question.body),
                headers=self._headers(),
                timeout=(_CONNECT_SECONDS, self.config.timeout),
            )
        except requests.RequestException as error:
            return self._failed(outcome, _kind_of(error))
        if response.status_code in _RETRIED:
            return self._failed(outcome, f"HTTP {response.status_code}", wait_for=_retry_after(response))
        if response.status_code != 200:
            outcome.errors.append(f"HTTP {response.status_code}: {self._without_key(response.text)[:_MESSAGE]}")
            outcome.failed = "refused"
            return None
        try:
            raw = response.json()
            reply = raw["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return self._failed(outcome, "broken answer")
        if reply is not None and not isinstance(reply, str):
            return self._failed(outcome, "broken answer")
        outcome.raw, outcome.failed = raw, ""
        with self._lock:
            self.tokens += _tokens_of(raw, question)
        return None

    def _failed(self, outcome: _Outcome, reason: str, *, wait_for: float = 0.0) -> float:
        outcome.failed = reason
        outcome.errors.append(reason)
        return wait_for

    def _take_from_budget(self) -> None:
        """Wait for the server's pause to end, then count the attempt; raise when it may not be made."""
        while (pause := self._not_before - time.monotonic()) > 0:
            if self._stopping.wait(pause):
                raise _Stopped
        if self._stopping.is_set():
            raise _Stopped
        with self._lock:
            spent = (self.config.max_requests and self.attempts >= self.config.max_requests) or (
                self.config.max_tokens and self.tokens >= self.config.max_tokens
            )
            if spent:
                raise _BudgetSpent
            self.attempts += 1

    def _hold(self, seconds: float, *, everybody: bool) -> None:
        """A server that says when to come back means every request, not only this one."""
        if everybody:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _session(self) -> requests.Session:
        if not hasattr(self._sessions, "session"):
            self._sessions.session = requests.Session()
        return self._sessions.session

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.config.api_key_env, "")
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _without_key(self, text: str) -> str:
        key = os.environ.get(self.config.api_key_env, "")
        return " ".join((text.replace(key, "(key)") if key else text).split())

    def _note(self, record: TextIO, question: ChatRequest, outcome: _Outcome) -> None:
        """Write what happened to a question, and remember its answer."""
        line: dict[str, Any] = {
            "request": question.hash,
            "key": question.key,
            "sample": question.sample,
            **self.facts,
            "prompt_sha256": question.prompt_hash,
            "body": question.body,
            "attempts": len(outcome.errors) + (outcome.raw is not None),
            "errors": outcome.errors,
            "seconds": outcome.seconds,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if outcome.raw is not None:
            answer = ChatAnswer.of(outcome.raw)
            line |= {"reply": answer.text, "raw": outcome.raw}
            self.known[question.hash] = answer
        record.write(json.dumps(line, ensure_ascii=False) + "\n")
        record.flush()
        if outcome.failed == "refused":
            self._refusal = outcome.errors[-1]

    def _kept(self, done: int, total: int) -> str:
        return f"{done} of {total} answers came and are kept in {self.record}"

    def _explain(self, failures: Counter[str], *, done: int, total: int) -> None:
        """Raise the one line that says why answers are missing, and what has been kept."""
        where = f"{self.config.model} at {self.config.base_url}"
        kept = self._kept(done, total)
        if "refused" in failures:
            hint = _HINTS.get(self._refusal[:8], "").format(key=self.config.api_key_env)
            raise UserError(f"{where} refuses: {self._refusal}{hint}; {kept}")
        if "budget" in failures:
            spent = f"{self.attempts} requests and {self.tokens} tokens"
            raise UserError(f"{where}: the budget is spent ({spent}); {kept}, run again to go on")
        reasons = ", ".join(f"{count} {reason}" for reason, count in failures.most_common() if reason != "stopped")
        raise UserError(f"{where} does not answer ({reasons or 'stopped'}); {kept}, run again to go on")


def _kind_of(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "timeout"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "truncated answer"
    return "no connection" if isinstance(error, requests.ConnectionError) else type(error).__name__


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait: a number, or a date; 0 where it asks for nothing."""
    asked = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _tokens_of(raw: Mapping[str, Any], question: ChatRequest) -> int:
    """What the server counted; where it counts nothing, four characters a token."""
    counted = (raw.get("usage") or {}).get("total_tokens")
    if isinstance(counted, int):
        return counted
    said = raw["choices"][0]["message"]["content"] or ""
    return (sum(len(message["content"]) for message in question.body["messages"]) + len(said)) // 4
