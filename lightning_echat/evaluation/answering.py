"""Puts the questions of an evaluation to a model and stores every answer with everything that was said and measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from rich.progress import track
from torch import Tensor

from lightning_echat.contracts import GeneratedReply, SampleRejected, TokenizedDialogue, UserError
from lightning_echat.data.batching import collate
from lightning_echat.data.decoding import ParsedDialogue
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.evaluation.controls import (
    SHUFFLE,
    ControlName,
    ForcedPrompt,
    dialogues_of,
    force_labels,
    partners_of,
    why_left_out,
    with_forced,
)
from lightning_echat.evaluation.item_sets import EvaluationSet, PosedItem, read_item_set, set_files
from lightning_echat.evaluation.label_probabilities import NamedLabels, label_probabilities
from lightning_echat.evaluation.records import RecordWriter, is_finished, record_of
from lightning_echat.evaluation.scores import file_name
from lightning_echat.nn.token2wav.interface import Token2Wav
from lightning_echat.nn.weights import TrainedModel, checkpoint_hash
from lightning_echat.tokens.tasks import DialogueTask, SpeechLayout
from lightning_echat.tokens.thinking import ThinkingForm

DIALOGUES = "dialogues"
UNDERSTANDING = "understanding-"

_LABELS = ("age", "gender", "emotion", "event")
_SAMPLED = 16
"""Where only some dialogues are kept as sound, one in so many is, from the first on."""


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """How questions are put.

    Attributes:
        labels: Label sets asked for in understanding.
        thinking, layout: Of the spoken dialogue.
        controls: Which controls are asked too.
        control_speech: Controls also speak, which a judge that hears replies needs. Without it their answers end with
            the text, which takes a third of the time.
        calibration: Also ask how sure the model is of the labels it names.
        batch: Dialogues answered at once.
        audio_items: Dialogues of which query and reply are kept as sound, spread over the set; all by default.
        decoding: Lengths, sampling and seed.
    """

    labels: tuple[str, ...] = _LABELS
    thinking: ThinkingForm = "label"
    layout: SpeechLayout = "sequential"
    controls: tuple[ControlName, ...] = ("text_only", "label_oracle", "neutral_voice", "shuffled_audio")
    control_speech: bool = False
    calibration: bool = True
    batch: int = 50
    audio_items: int | None = None
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        """Refuse sizes that ask nothing."""
        if self.batch < 1:
            raise UserError(f"questions.batch is {self.batch}; it must be at least 1")

    @property
    def spoken_task(self) -> DialogueTask:
        """The dialogue itself."""
        return DialogueTask(kind="speech_to_speech", thinking=self.thinking, layout=self.layout)

    @property
    def understanding_task(self) -> DialogueTask:
        """What is said and how."""
        return DialogueTask(kind="transcribe_and_label", labels=tuple(self.labels))


@dataclass(slots=True, kw_only=True)
class _Asked:
    """One question, ready to be put."""

    posed: PosedItem
    prompt: TokenizedDialogue
    audio: Tensor | None
    forced: ForcedPrompt | None = None

    @property
    def dialogue(self) -> TokenizedDialogue:
        """What the model reads."""
        return self.forced.dialogue if self.forced else self.prompt


class Answerer:
    """Asks one model and stores its answers in one folder.

    Args:
        trained: The model.
        voice: What turns its codes into sound.
        config: How questions are put.
        folder: Where answers go.
        device: Where the model is.
    """

    def __init__(
        self, trained: TrainedModel, voice: Token2Wav, config: QuestionConfig, *, folder: Path, device: torch.device
    ) -> None:
        self.trained = trained
        self.voice = voice
        self.config = config
        self.folder = folder
        self.device = device
        self.checkpoint_hash = checkpoint_hash(trained.path)
        self.skipped: dict[str, dict[str, int]] = {}
        self._reader = DialogueReader(ReadingConfig(tokens=trained.tokens, max_skip_share=1.0))

    def understanding(self, entry: EvaluationSet) -> str:
        """What is said in the items of a set, and how. Returns the name of the answers."""
        return self._answer(entry, f"{UNDERSTANDING}{file_name(entry.name)}", task=self.config.understanding_task)

    def dialogues(self, entry: EvaluationSet) -> str:
        """Replies to the items of a set. Returns the name of the answers."""
        return self._answer(entry, DIALOGUES, task=self.config.spoken_task)

    def controls(self, entry: EvaluationSet) -> dict[ControlName, str]:
        """Answers of every control that can be asked; control -> why it was left out, for those that cannot."""
        left_out: dict[ControlName, str] = {}
        # Not every item need bring a neutral voice; usually the first one does, and no more is read.
        has_neutral = "neutral_voice" in self.config.controls and any(
            posed.neutral_audio is not None for posed in read_item_set(entry, counter=SkipCounter())
        )
        for control in self.config.controls:
            why = why_left_out(control, task=self.config.spoken_task, has_neutral=has_neutral)
            if why:
                left_out[control] = why
                continue
            task = DialogueTask(kind="text_to_text") if control == "text_only" else self.config.spoken_task
            self._answer(entry, control, task=task, control=control)
        return left_out

    def made_by(self, entry: EvaluationSet, name: str, task: DialogueTask) -> str:
        """What decides the answers: weights, items, task and settings."""
        files = [(file, Path(file).stat().st_size, Path(file).stat().st_mtime_ns) for file in set_files(entry)]
        decided = asdict(self.config)
        decided.pop("controls")
        settings = [self.checkpoint_hash, name, entry.max_items, files, task.name, task.labels, decided]
        if name == "shuffled_audio":
            settings.append(SHUFFLE)
        return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()

    def _answer(
        self, entry: EvaluationSet, name: str, *, task: DialogueTask, control: ControlName | None = None
    ) -> str:
        """Answer what is not answered yet. A finished file is not even opened for reading."""
        made_by = self.made_by(entry, name, task)
        if is_finished(self.folder / f"{name}.jsonl", made_by=made_by):
            return name
        counter = SkipCounter()
        with RecordWriter(self.folder, name=name, made_by=made_by) as writer:
            batches = _batches(read_item_set(entry, counter=counter), self.config.batch)
            place = 0
            for batch in track(batches, description=f"{entry.name}: {name}", transient=True):
                if not all(posed.item.key in writer.done for posed in batch):
                    asked = self._ask(batch, task, control, counter)
                    self._write(asked, writer, task=task, control=control, first=place, batch=batch)
                place += len(batch)
            if not writer.done:
                raise UserError(f"evaluation set {entry.name!r}: no item can be asked ({name}): {counter.summary()}")
        self.skipped[name] = counter.skipped
        return name

    def _ask(
        self, batch: Sequence[PosedItem], task: DialogueTask, control: ControlName | None, counter: SkipCounter
    ) -> list[_Asked]:
        """The questions of a batch; items that cannot be asked are counted."""
        asked = []
        for posed, dialogue in zip(batch, dialogues_of(control, batch), strict=True):
            try:
                if isinstance(dialogue, SampleRejected):
                    raise dialogue
                asked.append(self._prompt(posed, dialogue, task, forced=control == "label_oracle"))
            except SampleRejected as error:
                counter.reject(error, shard=posed.parsed.sample.shard, key=posed.item.key)
        return asked

    def _prompt(self, posed: PosedItem, dialogue: ParsedDialogue, task: DialogueTask, *, forced: bool) -> _Asked:
        sample = self._reader.with_mels(dialogue, task)
        prompt = self._reader.tokenizer.prompt(sample, task)
        heard = [turn.audio for turn in sample.turns if turn.role == "user"]
        begun = force_labels(prompt, self._reader.tokenizer, task) if forced else None
        return _Asked(posed=posed, prompt=prompt, audio=heard[-1], forced=begun)

    def _write(
        self,
        asked: Sequence[_Asked],
        writer: RecordWriter,
        *,
        task: DialogueTask,
        control: ControlName | None,
        first: int,
        batch: Sequence[PosedItem],
    ) -> None:
        """Generate the answers of a batch and store those that are not there yet."""
        replies = self._generate(asked, task=task, control=control)
        probabilities = self._probabilities(asked, replies, task)
        places = {posed.item.key: number for number, posed in enumerate(batch)}
        partners = partners_of(list(places))
        for question, reply, found in zip(asked, replies, probabilities, strict=True):
            if question.posed.item.key in writer.done:
                continue
            record = record_of(
                reply,
                set_name=question.posed.item.set_name,
                fmt=self.trained.tokenizer.prompt_set.thinking,
                item=question.posed.item,
            )
            place = places[question.posed.item.key]
            record = replace(
                record,
                heard_key=batch[partners[place]].item.key if control == "shuffled_audio" else "",
                checkpoint=self.checkpoint_hash,
                seed=self.config.decoding.seed,
                label_probabilities=found,
            )
            keep = task.traits.converses and self._keeps_sound(first + place, control)
            writer.write(record, **self._sounds(question, reply) if keep else {})

    def _generate(
        self, asked: Sequence[_Asked], *, task: DialogueTask, control: ControlName | None
    ) -> list[GeneratedReply]:
        if not asked:
            return []
        dialogues = [question.dialogue for question in asked]
        vocabulary, bins = self._reader.tokenizer.vocabulary, self.trained.tokens.mel_bins
        batch = move_data_to_device(collate(dialogues, padding=vocabulary.padding, mel_bins=bins), self.device)
        silent = control is not None and not self.config.control_speech and task.layout == "sequential"
        # A boundary and one code: enough to see that the text came to its end.
        decoding = replace(self.config.decoding, max_speech_ids=2) if silent else self.config.decoding
        replies = generate(self.trained.model, batch, self.trained.tokenizer, decoding)
        if silent and task.traits.speaks:
            replies = [_without_speech(reply) for reply in replies]
        return [
            with_forced(reply, question.forced, self.trained.tokenizer) if question.forced else reply
            for question, reply in zip(asked, replies, strict=True)
        ]

    def _probabilities(
        self, asked: Sequence[_Asked], replies: Sequence[GeneratedReply], task: DialogueTask
    ) -> list[dict[str, dict[str, float]]]:
        if not (self.config.calibration and task.traits.labels and asked):
            return [{} for _ in asked]
        fmt = self.trained.tokenizer.prompt_set.thinking
        answers = [record_of(reply, set_name="", fmt=fmt).answer for reply in replies]
        named = [
            NamedLabels(prompt=question.prompt, words=answer.transcript or "", labels=answer.labels)
            for question, answer in zip(asked, answers, strict=True)
        ]
        return label_probabilities(self.trained.model, self.trained.tokenizer, named, device=self.device)

    def _keeps_sound(self, place: int, control: ControlName | None) -> bool:
        if control is not None and not self.config.control_speech:
            return False
        wanted = self.config.audio_items
        return wanted is None or (place % _SAMPLED == 0 and place // _SAMPLED < wanted)

    def _sounds(self, question: _Asked, reply: GeneratedReply) -> dict[str, Any]:
        sounds: dict[str, Any] = {}
        if question.audio is not None:
            sounds["query"] = question.audio
        if reply.speech_codes.numel():
            sounds["reply"] = self.voice.decode(reply.speech_codes.cpu())
        return sounds


def _batches(items: Iterator[PosedItem], size: int) -> Iterator[list[PosedItem]]:
    batch: list[PosedItem] = []
    for posed in items:
        batch.append(posed)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _without_speech(reply: GeneratedReply) -> GeneratedReply:
    """The answer as if it had been asked for text alone: complete once its speech has begun."""
    complete = reply.finished or reply.speech_codes.numel() > 0
    return replace(reply, speech_codes=reply.speech_codes[:0], finished=complete)
