"""A language model as judge, behind any OpenAI-compatible endpoint: an API, or a local vLLM server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.chat_endpoint import ChatEndpoint, EndpointConfig
from lightning_echat.evaluation.chat_record import ChatAnswer, ChatRequest
from lightning_echat.evaluation.judging import JudgedReply, JudgeScore
from lightning_echat.evaluation.llm_rubric import DEFAULT_LLM_RUBRIC, load_llm_rubric, mean_scores
from lightning_echat.evaluation.reply_emotion import hear_replies, make_recogniser
from lightning_echat.evaluation.scores import judge_folder

REQUESTS = "requests.jsonl"
"""Record of everything that was asked and answered, in the judge's folder."""


class LLMJudge:
    """Asks a language model for scores by a rubric of `llm_rubrics`, `n` times a reply.

    Args:
        base_url: The server's address up to /v1.
        model: The model's name there.
        rubric: Name of a rubric that comes with the package, or a YAML file.
        n: Answers asked for each reply; their mean counts.
        response_format: What the server is asked to hold its answer to; `none` for servers that know neither.
        request: Further keys of every request, for what servers differ in; null takes a key away:
            {max_tokens: null, max_completion_tokens: 2000}, {chat_template_kwargs: {enable_thinking: false}}.
        reply_emotion: Who hears the emotion of spoken replies: none, understanding, hf, or a class path.
        reply_emotion_args: Arguments of that recogniser.
        api_key_env: Environment variable with the key, which is never stored.
        temperature: Of the judge's sampling.
        max_reply_tokens: After which its answer is cut.
        concurrency: Requests under way at once.
        timeout: Seconds to wait for an answer.
        retries: Attempts after the first.
        back_off: Seconds before the first retry, doubled for each further one.
        max_requests: Budget of one run, failed attempts included; 0 for none.
        max_tokens: The same in tokens.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        rubric: str = DEFAULT_LLM_RUBRIC,
        n: int = 1,
        response_format: Literal["json_object", "json_schema", "none"] = "json_object",
        request: dict[str, Any] | None = None,
        reply_emotion: str = "none",
        reply_emotion_args: dict[str, Any] | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        max_reply_tokens: int = 512,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        back_off: float = 1.0,
        max_requests: int = 0,
        max_tokens: int = 0,
    ) -> None:
        if n < 1:
            raise UserError(f"n is {n}; a reply must be judged at least once")
        self.rubric = load_llm_rubric(rubric)
        self.n = n
        self.response_format = response_format
        self.request = request or {}
        self.recogniser = make_recogniser(reply_emotion, reply_emotion_args)
        self.endpoint = EndpointConfig(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            temperature=temperature,
            max_reply_tokens=max_reply_tokens,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            back_off=back_off,
            max_requests=max_requests,
            max_tokens=max_tokens,
        )
        self._asked: dict[Path, ChatEndpoint] = {}

    @property
    def name(self) -> str:
        """Rubric, model and everything else that can change a score."""
        parts = ["llm", self.rubric.identifier, self.endpoint.model, f"t{self.endpoint.temperature:g}", f"n{self.n}"]
        if self.request:
            parts.append(hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest()[:8])
        hears = f"hears {self.recogniser.name}" if self.recogniser else "hears nothing"
        return "/".join([*parts, hears])

    def score_all(self, replies: Sequence[JudgedReply], *, folder: Path) -> list[JudgeScore | None]:
        """Ask about every reply; what is recorded in `folder` is not asked again."""
        heard = [None] * len(replies)
        if self.recogniser is not None:
            heard = hear_replies([said.reply_audio for said in replies], self.recogniser, folder=folder)
            self._tell_unheard(replies, heard)
        questions = [
            self._request(said, emotion, sample)
            for said, emotion in zip(replies, heard, strict=True)
            for sample in range(self.n)
        ]
        answers = self._endpoint_for(folder).answers(questions)
        read = [self.rubric.read(answer.text, with_voice=self.recogniser is not None) for answer in answers]
        if unread := [answer for answer, scores in zip(answers, read, strict=True) if scores is None]:
            self._tell_unread(unread, of=len(read), folder=folder)
        groups = [read[start : start + self.n] for start in range(0, len(read), self.n)]
        return [self._score(said, group) for said, group in zip(replies, groups, strict=True)]

    def _tell_unheard(self, replies: Sequence[JudgedReply], heard: Sequence[str | None]) -> None:
        """Of a reply without sound the judge is told so, and scores its voice all the same."""
        silent = sum(said.reply_audio is None for said in replies)
        unnamed = sum(emotion is None for emotion in heard) - silent
        counts = {
            "have no stored sound (questions.audio_items, questions.control_speech)": silent,
            "had no emotion that could be named": unnamed,
        }
        for what, count in counts.items():
            if count:
                line = f"{count} of {len(replies)} replies {what}: the judge is told that nothing could be heard"
                Console().print(line, highlight=False, markup=False, soft_wrap=True)

    def _tell_unread(self, unread: Sequence[ChatAnswer], *, of: int, folder: Path) -> None:
        cut = sum(answer.cut for answer in unread)
        why = f", {cut} of them cut at {self.endpoint.max_reply_tokens} tokens (max_reply_tokens)" if cut else ""
        where = judge_folder(folder, self.name) / REQUESTS
        line = f"{self.name}: {len(unread)} of {of} answers could not be read{why}; they count for nothing: {where}"
        Console().print(line, highlight=False, markup=False, soft_wrap=True)

    def _endpoint_for(self, folder: Path) -> ChatEndpoint:
        """One for each folder, so that its budget and record hold over all files of answers."""
        if folder not in self._asked:
            facts = {
                "model": self.endpoint.model,
                "rubric": self.rubric.identifier,
                "temperature": self.endpoint.temperature,
                "n": self.n,
            }
            record = judge_folder(folder, self.name) / REQUESTS
            self._asked[folder] = ChatEndpoint(self.endpoint, record=record, facts=facts)
        return self._asked[folder]

    def _request(self, said: JudgedReply, emotion: str | None, sample: int) -> ChatRequest:
        with_voice = self.recogniser is not None
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": self.rubric.messages(
                said.transcript, labels=said.labels, reply=said.reply, reply_emotion=emotion, with_voice=with_voice
            ),
            "temperature": self.endpoint.temperature,
            "max_tokens": self.endpoint.max_reply_tokens,
        }
        if self.response_format == "json_schema":
            schema = {"name": self.rubric.identifier, "schema": self.rubric.schema(with_voice=with_voice)}
            body["response_format"] = {"type": "json_schema", "json_schema": {**schema, "strict": True}}
        elif self.response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        body = {name: value for name, value in {**body, **self.request}.items() if value is not None}
        return ChatRequest(key=said.key, body=body, sample=sample)

    def _score(self, said: JudgedReply, samples: Sequence[dict[str, float] | None]) -> JudgeScore | None:
        """The mean over the answers that could be read, 0 to 100; None where none could."""
        usable = [scores for scores in samples if scores is not None]
        if not usable:
            return None
        low, high = self.rubric.low, self.rubric.high
        points = {name: 100.0 * (value - low) / (high - low) for name, value in mean_scores(usable).items()}
        total = sum(points.values()) / len(points)
        return JudgeScore(
            total=total, by_category={name: total for name in said.categories}, per_dimension=points, on_topic=None
        )
