"""`echat chat`: spoken questions in, thinking, text and speech out, over one or several turns."""

from __future__ import annotations

import json as json_format
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch
from torch import Tensor

from lightning_echat.contracts import DialogueSample, GeneratedReply, PackedBatch, SampleRejected, Turn, UserError
from lightning_echat.conversation import ConversationMemory
from lightning_echat.data.batching import collate
from lightning_echat.data.decoding import decode_waveform
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.nn.token2wav.chunks import ChunkConfig
from lightning_echat.nn.token2wav.interface import Token2Wav, load_token2wav
from lightning_echat.nn.weights import TrainedModel, load_trained
from lightning_echat.streaming import StreamEvent, stream_answer
from lightning_echat.tokens.paralinguistics import LABEL_SETS
from lightning_echat.tokens.tasks import DialogueTask
from lightning_echat.tokens.thinking import ThinkingForm, parse_thinking


@dataclass(slots=True, kw_only=True)
class ChatAnswer:
    """The answer to one turn.

    Attributes:
        query: The wav file that was heard.
        thinking: What the model wrote about it, as it stands and parsed; empty without thinking.
        text: The words of the reply.
        audio: The wav file of the reply, None where it has no speech.
        seconds: Of the reply's audio.
        finished: False when a length limit cut the answer short.
        timings: Seconds spent, by phase.
        stream: With `stream`: the events in their order, and what took how long (`streaming.AnswerTiming`).
    """

    query: str
    thinking: dict[str, Any]
    text: str
    audio: str | None
    seconds: float
    finished: bool
    timings: dict[str, float] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)


def chat(
    checkpoint: Path,
    audio: list[Path],
    out: Path | None = None,
    *,
    json: bool = False,
    stream: bool = False,
    thinking: ThinkingForm = "label",
    layout: Literal["sequential", "interleaved"] = "sequential",
    speech_tokenizer: Path | None = None,
    decoding: DecodingConfig | None = None,
    chunks: ChunkConfig | None = None,
) -> None:
    """Answer one spoken question, or several as the turns of one conversation.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or one of echat convert.
        audio: Wav or FLAC files, one a turn; any sample rate.
        out: The wav file to write; with several turns their numbers are added to its name. Without it the model
            answers in text alone, and no speech tokenizer is needed.
        json: Print JSON instead of text.
        stream: Make the sound while the model writes, and tell thinking, words, codes and sound as they come, each
            with its time.
        thinking: Form of the thinking before the reply.
        layout: Order of text and speech in the reply.
        speech_tokenizer: Folder of the speech tokenizer, where the checkpoint names none that still exists.
        decoding: Lengths, sampling and seed.
        chunks: How the sound is cut where it streams.
    """
    if not audio:
        raise UserError("no audio: give --audio IN.wav, several times for several turns")
    if out is not None and out.suffix.lower() not in (".wav", ".flac"):
        raise UserError(f"--out {out}: the name of the answer ends in .wav or .flac")
    # All are read first: a missing file is told before a minute has been spent on the others.
    waveforms = [read_waveform(path) for path in audio]
    trained = load_trained(checkpoint)
    voice = open_voice(trained, speech_tokenizer) if out is not None else None
    spoken = DialogueTask(kind="speech_to_speech", thinking=thinking, layout=layout)
    conversation = _Conversation(
        trained=trained,
        task=spoken if voice is not None else DialogueTask(kind="speech_to_text", thinking=thinking),
        decoding=decoding or DecodingConfig(),
        voice=voice,
        chunks=chunks or ChunkConfig(),
    )
    answers: list[ChatAnswer] = []
    for number, (path, waveform) in enumerate(zip(audio, waveforms, strict=True), start=1):
        show = _ShowEvents(f"turn {number}: {path}") if stream and not json else None
        answer, sound = conversation.take_turn(path, waveform, stream=stream, show=show)
        if out is not None and voice is not None and sound is not None:
            target = out if len(audio) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
            write_waveform(target, sound, voice.sample_rate)
            answer = replace(answer, audio=str(target), seconds=sound.shape[0] / voice.sample_rate)
        answers.append(answer)
        if not json:
            _print(answer, number=number)
    if json:
        sys.stdout.write(
            json_format.dumps(_rounded({"turns": [asdict(a) for a in answers]}), ensure_ascii=False) + "\n"
        )


def open_voice(trained: TrainedModel, folder: Path | None) -> Token2Wav:
    """The speech tokenizer given, or else the one that the checkpoint was trained with."""
    place = folder or (Path(trained.tokens.speech_tokenizer) if trained.tokens.speech_tokenizer else None)
    if place is None:
        raise UserError(f"{trained.path} names no speech tokenizer; give --speech_tokenizer FOLDER")
    voice = load_token2wav(place)
    if voice.codebook_size != trained.tokens.codebook_size:
        raise UserError(
            f"speech tokenizer {place} has {voice.codebook_size} codes but the model speaks "
            f"{trained.tokens.codebook_size}; give the one it was trained with"
        )
    return voice


def read_waveform(path: Path) -> Any:
    """A wav or FLAC file -> [samples] float32 at 16 kHz; `UserError` where it cannot be used."""
    try:
        return decode_waveform(path.read_bytes())
    except SampleRejected as error:
        raise UserError(f"{path}: {error}; give a wav or FLAC file with speech in it") from error


@dataclass(slots=True, kw_only=True)
class _Spoken:
    """The sound of an answer, None where it has no codes, and what is told of how it came about."""

    waveform: Tensor | None = None
    timings: dict[str, float] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class _Conversation:
    """The turns with one model: each reads only what the turns before have not left in memory."""

    trained: TrainedModel
    task: DialogueTask
    decoding: DecodingConfig
    voice: Token2Wav | None
    chunks: ChunkConfig
    turns: list[Turn] = field(default_factory=list)
    memory: ConversationMemory = field(default_factory=ConversationMemory)

    def take_turn(
        self, path: Path, waveform: Tensor, *, stream: bool, show: _ShowEvents | None
    ) -> tuple[ChatAnswer, Tensor | None]:
        """Answer one question; the answer joins the history. Its sound comes apart, None where it has no codes."""
        started = time.perf_counter()
        log_mel = LogMel(mel_bins=self.trained.tokens.mel_bins)(waveform)
        features = time.perf_counter() - started
        self.turns.append(Turn(role="user", log_mel=log_mel))
        reply, spoken = self._streamed(show) if stream else self._whole()
        thinks = self.task.thinking != "none"
        parsed = parse_thinking(reply.text, self.trained.tokenizer.prompt_set.thinking)
        words = parsed.reply if thinks else reply.text.strip()
        codes = reply.speech_codes if reply.speech_codes.numel() else None
        self.turns.append(Turn(role="assistant", text=words, speech_codes=codes))
        answer = ChatAnswer(
            query=str(path),
            thinking={k: v for k, v in asdict(parsed).items() if k != "reply"} if thinks else {},
            text=words,
            audio=None,
            seconds=0.0,
            finished=reply.finished,
            timings={"features": features, **reply.timings, **spoken.timings},
            stream=spoken.stream,
        )
        return answer, spoken.waveform

    def _whole(self) -> tuple[GeneratedReply, _Spoken]:
        """The answer to the last turn, and then its sound."""
        trained = self.trained
        (reply,) = generate(trained.model, self._batch(), trained.tokenizer, self.decoding, memory=self.memory)
        if self.voice is None or reply.speech_codes.numel() == 0:
            return reply, _Spoken()
        started = time.perf_counter()
        waveform = self.voice.decode(reply.speech_codes)
        return reply, _Spoken(waveform=waveform, timings={"token2wav": time.perf_counter() - started})

    def _streamed(self, show: _ShowEvents | None) -> tuple[GeneratedReply, _Spoken]:
        """The same, event by event."""
        trained = self.trained
        events = stream_answer(
            trained.model,
            self._batch(),
            trained.tokenizer,
            self.decoding,
            token2wav=self.voice,
            chunks=self.chunks,
            memory=self.memory,
        )
        told: list[dict[str, Any]] = []
        pieces: list[Tensor] = []
        for event in events:
            if show is not None:
                show(event, sample_rate=self.voice.sample_rate if self.voice is not None else 1)
            told.append(_told(event))
            if event.waveform is not None:
                pieces.append(event.waveform)
        assert event.reply is not None and event.timing is not None
        waveform = torch.cat(pieces) if pieces else None
        return event.reply, _Spoken(waveform=waveform, stream={"events": told, "timing": asdict(event.timing)})

    def _batch(self) -> PackedBatch:
        sample = DialogueSample(turns=list(self.turns), key=f"chat-{len(self.turns) // 2 + 1}")
        prompt = self.trained.tokenizer.prompt(sample, self.task)
        padding = self.trained.tokenizer.vocabulary.padding
        return collate([prompt], padding=padding, mel_bins=self.trained.tokens.mel_bins)


def _rounded(value: Any) -> Any:
    """JSON whose seconds are told to a tenth of a millisecond."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


def _told(event: StreamEvent) -> dict[str, Any]:
    """An event as JSON holds it: what kind, when, and its text or size."""
    told: dict[str, Any] = {"kind": event.kind, "at": event.at}
    if event.text:
        told["text"] = event.text
    if event.codes:
        told["codes"] = len(event.codes)
    if event.waveform is not None:
        told["samples"] = event.waveform.shape[0]
    return told


def write_waveform(target: Path, waveform: Tensor, sample_rate: int) -> None:
    """Write [samples] as a sound file, which is never seen half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial" + target.suffix)
    soundfile.write(partial, waveform.cpu().numpy(), sample_rate)
    partial.replace(target)


class _ShowEvents:
    """Prints events as they come, one line for each run of text and one for each piece of anything else."""

    def __init__(self, title: str) -> None:
        self._kind = ""
        self._line_open = False
        sys.stdout.write(f"{title}, as it comes\n")

    def __call__(self, event: StreamEvent, *, sample_rate: int) -> None:
        """Print one."""
        if event.kind in ("thinking", "text") and event.kind == self._kind:
            sys.stdout.write(event.text)
        else:
            size = ""
            if event.codes:
                size = f"{len(event.codes)} codes"
            elif event.waveform is not None:
                size = f"{event.waveform.shape[0] / sample_rate:.2f} s of sound"
            opening = "\n" if self._line_open else ""
            line = f"{opening}  {event.at:7.3f} s  {event.kind:<9} {event.text or size}"
            sys.stdout.write(line if event.text else line.rstrip(" "))
        self._kind, self._line_open = event.kind, event.kind != "done"
        if event.kind == "done":
            sys.stdout.write("\n")
        sys.stdout.flush()


def _print(answer: ChatAnswer, *, number: int) -> None:
    labels = answer.thinking.get("labels", {})
    heard = ", ".join(f"{name} {labels[name]}" for name in LABEL_SETS if name in labels)
    lines = [f"turn {number}: {answer.query}"]
    if answer.thinking:
        if answer.thinking["written"] and not answer.thinking["well_formed"]:
            lines.append(f"  thinks  {answer.thinking['written']}")
        lines.append(f"  heard   {answer.thinking['transcript'] or '(nothing that could be parsed)'}")
        lines.append(f"  voice   {heard or '(nothing that could be parsed)'}")
        lines.append(f"  tone    {answer.thinking['reply_emotion'] or '(none)'}")
    lines.append(f"  reply   {answer.text}")
    spoken = f"{answer.audio} ({answer.seconds:.1f} s)" if answer.audio else "(no speech)"
    lines.append(f"  speech  {spoken}")
    if not answer.finished:
        lines.append("  note    cut short by a length limit; raise decoding.max_text_ids or max_speech_ids")
    lines += _stream_lines(answer.stream)
    lines.append("  time    " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in answer.timings.items()))
    sys.stdout.write("\n".join(lines) + "\n")


def _stream_lines(stream: dict[str, Any]) -> list[str]:
    """What a user waited for, one line."""
    if not stream:
        return []
    timing = stream["timing"]
    firsts = [
        f"{name} after {timing[key]:.2f} s"
        for name, key in (("first text", "first_text"), ("first code", "first_code"), ("first sound", "first_audio"))
        if timing[key] is not None
    ]
    rates = [
        f"{name} {timing[key]:.2f} s a second of sound"
        for name, key in (("codes", "codes_rtf"), ("token2wav", "token2wav_rtf"))
        if timing[key] is not None
    ]
    thought = f"thinking {timing['thinking_ids']} ids in {timing['thinking']:.2f} s"
    stalls = f"{timing['stalls']} stalls, {timing['stall_seconds']:.2f} s together"
    return ["  stream  " + ", ".join([thought, *firsts, *rates, *([stalls] if timing["audio"] else [])])]
