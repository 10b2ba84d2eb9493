"""`echat evaluate`: a checkpoint answers the evaluation sets, the judge scores, and report.json says how it went.

Three kinds of question are put to the model: what is said and how (understanding), the dialogue itself with thinking
and a spoken reply, and, as a control, the same dialogue as text only. Every answer is stored in `OUT/evaluation/`;
answers that are already there, made by the same checkpoint with the same settings, are not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

from lightning_echat.contracts import GeneratedReply, SampleRejected, UserError
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import ValidationLoader
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.query_audio import read_query_audio
from lightning_echat.data.shards import expand_shards
from lightning_echat.data.validation_stream import ValidationStream
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.evaluation.chat import open_voice
from lightning_echat.evaluation.machine import machine_facts, package_versions
from lightning_echat.evaluation.records import (
    AnswerRecord,
    RecordWriter,
    read_records,
    record_of,
    score_records,
    write_records,
)
from lightning_echat.evaluation.rubric import DEFAULT_RUBRIC, RubricJudge
from lightning_echat.evaluation.summary import summarize, write_report_json
from lightning_echat.nn.token2wav.interface import Token2Wav
from lightning_echat.nn.weights import TrainedModel, load_trained
from lightning_echat.tokens.tasks import SpeechLayout
from lightning_echat.tokens.thinking import ThinkingForm

_LABELS = ("age", "gender", "emotion", "event")


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A named set of dialogues.

    Attributes:
        name: How reports call it.
        shards: Patterns, as for training.
    """

    name: str
    shards: list[str]


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """How questions are put.

    Attributes:
        labels: Label sets asked for in understanding.
        thinking, layout: Of the spoken dialogue.
        batch: Dialogues answered at once.
        audio_items: Dialogues of which query and reply are kept as sound, spread over the set.
        decoding: Lengths, sampling and seed.
        rubric: Name or file of the rubric that judges replies.
    """

    labels: tuple[str, ...] = _LABELS
    thinking: ThinkingForm = "label"
    layout: SpeechLayout = "sequential"
    batch: int = 50
    audio_items: int = 24
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    rubric: str = DEFAULT_RUBRIC


def evaluate(
    checkpoint: Path,
    sets: list[EvaluationSet],
    out: Path,
    *,
    questions: QuestionConfig | None = None,
    speech_tokenizer: Path | None = None,
    seed: int = 0,
) -> None:
    """Answer, score, and write OUT/report.json and OUT/evaluation/.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or one of echat convert.
        sets: Understanding is measured on all of them, dialogue on the first.
        out: The run folder. What stages and data left there (stage_summary.json, data_health.json) joins the report.
        questions: How they are put.
        speech_tokenizer: Folder of the speech tokenizer, where the checkpoint names none that still exists.
        seed: Of the bootstrap intervals.
    """
    started = time.perf_counter()
    questions = questions or QuestionConfig()
    _check_sets(sets)
    trained = load_trained(checkpoint)
    voice = open_voice(trained, speech_tokenizer)
    judge = RubricJudge(questions.rubric)
    asked = _Questions(trained=trained, voice=voice, config=questions, folder=out / "evaluation")
    understanding = [
        record
        for entry in sets
        for record in asked.answers(
            entry, TaskConfig(kind="transcribe_and_label", labels=questions.labels), "understanding"
        )
    ]
    spoken = TaskConfig(kind="speech_to_speech", thinking=questions.thinking, layout=questions.layout)
    dialogues = score_records(asked.answers(sets[0], spoken, "dialogues", audio=True), judge=judge)
    blind = score_records(asked.answers(sets[0], TaskConfig(kind="text_to_text"), "text_only"), judge=judge)
    for name, records in (("dialogues", dialogues), ("text_only", blind)):
        write_records(asked.folder / f"{name}.jsonl", records, made_by=asked.made_by(sets[0], name))
    summary = summarize(understanding=understanding, dialogues=dialogues, controls={"text_only": blind}, seed=seed)
    run = _what_the_run_left(out)
    report = {
        "seconds": round(run.pop("seconds") + time.perf_counter() - started, 1),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "checkpoint": {"path": str(trained.path), "step": trained.step, "sha256": asked.checkpoint_hash},
        "machine": machine_facts(),
        "versions": package_versions(),
        "seed": seed,
        **run,
        **summary,
    }
    write_report_json(out / "report.json", report)


@dataclass(slots=True, kw_only=True)
class _Questions:
    """Puts one kind of question to one model and stores the answers."""

    trained: TrainedModel
    voice: Token2Wav
    config: QuestionConfig
    folder: Path
    checkpoint_hash: str = ""

    def __post_init__(self) -> None:
        self.checkpoint_hash = _checkpoint_hash(self.trained.path)

    def made_by(self, entry: EvaluationSet, kind: str) -> str:
        """What decides the answers: weights, questions and settings."""
        settings = json.dumps([self.checkpoint_hash, kind, expand_shards(entry.shards), repr(self.config)])
        return hashlib.sha256(settings.encode()).hexdigest()

    def answers(self, entry: EvaluationSet, task: TaskConfig, kind: str, *, audio: bool = False) -> list[AnswerRecord]:
        """The stored answers to a set, asking what is not there yet."""
        name = kind if kind != "understanding" else f"understanding-{_file_name(entry.name)}"
        made_by = self.made_by(entry, kind)
        with RecordWriter(self.folder, name=name, made_by=made_by) as writer:
            for generated in self._generate(entry, task, done=writer.done):
                number = len(writer.done)
                record = record_of(generated, set_name=entry.name, fmt=self.trained.tokenizer.prompt_set.thinking)
                if generated.reference.key in writer.done:
                    continue
                keep = audio and number % 16 == 0 and number // 16 < self.config.audio_items
                writer.write(record, **self._waveforms(generated) if keep else {})
        return read_records(self.folder / f"{name}.jsonl")

    def _generate(self, entry: EvaluationSet, task: TaskConfig, *, done: set[str]) -> Iterator[GeneratedReply]:
        reading = ReadingConfig(
            tokens=self.trained.tokens, batching=BatchingConfig(validation_rows=self.config.batch), expand_history=False
        )
        stream = ValidationStream(reading, source=SourceConfig(shards=entry.shards, tasks=[task]), name=entry.name)
        loader = ValidationLoader(stream, num_workers=0)
        for batch in track(loader, description=f"{entry.name}: {task.task.name}", transient=True):
            if batch.references and not all(reference.key in done for reference in batch.references):
                yield from generate(self.trained.model, batch, self.trained.tokenizer, self.config.decoding)

    def _waveforms(self, generated: GeneratedReply) -> dict[str, Any]:
        sounds: dict[str, Any] = {}
        # Without its query's sound an answer counts all the same, and the report says that it has none.
        with suppress(SampleRejected):
            sounds["query"] = read_query_audio(generated.reference)
        if generated.speech_codes.numel():
            sounds["reply"] = self.voice.decode(generated.speech_codes)
        return sounds


def _check_sets(sets: list[EvaluationSet]) -> None:
    """Every set has a file of answers of its own."""
    if not sets:
        raise UserError("no evaluation set; give --sets '[{name: NAME, shards: [FOLDER]}]'")
    names = [_file_name(entry.name) for entry in sets]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two evaluation sets are called {repeated!r}; give each a name of its own")


def _file_name(name: str) -> str:
    """A set's name as part of a file's: everything but letters, digits, - and _ becomes _."""
    return re.sub(r"[^\w-]", "_", name)


def _checkpoint_hash(path: Path) -> str:
    """Of a checkpoint file, or of everything in a converted folder that decides an answer."""
    files = (
        [path]
        if path.is_file()
        else sorted(f for f in path.glob("*") if f.suffix in (".safetensors", ".json", ".yaml"))
    )
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _what_the_run_left(out: Path) -> dict[str, Any]:
    """Stages, data and seconds from the files that training and the recipe left below `out`."""
    stages: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for file in sorted(out.glob("*/stage_summary.json"), key=lambda f: f.stat().st_mtime):
        # What a recipe moved aside was trained with other settings and is not part of this run.
        if file.parent.suffix == ".stale":
            continue
        summary = json.loads(file.read_text())
        stages[file.parent.name] = {k: summary[k] for k in ("seconds", "steps", "loss_first", "loss_last")}
        health = file.with_name("data_health.json")
        if health.is_file():
            data[file.parent.name] = json.loads(health.read_text())
    steps = [json.loads(file.read_text()) for file in sorted(out.glob(".recipe/*.json"))]
    seconds = sum(step["seconds"] for step in steps if step.get("seconds"))
    peak = max((step.get("peak_memory_bytes", 0) for step in steps), default=0)
    return {
        "seconds": seconds or sum(stage["seconds"] for stage in stages.values()),
        "peak_memory_bytes": peak or None,
        "stages": stages,
        "data": _total_health(data),
    }


def _total_health(per_stage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The data section: totals over the stages, and each stage's own counts."""
    skipped: dict[str, int] = {}
    for health in per_stage.values():
        for reason, count in health.get("skipped", {}).items():
            skipped[reason] = skipped.get(reason, 0) + count
    positions = sum(health.get("positions", 0) for health in per_stage.values())
    padding = sum(health.get("positions", 0) * (health.get("padding_share") or 0.0) for health in per_stage.values())
    return {
        "samples": sum(health.get("samples", 0) for health in per_stage.values()),
        "skipped": skipped,
        "padding_share": padding / positions if positions else None,
        "stages": per_stage,
    }
