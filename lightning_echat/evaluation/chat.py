"""`echat chat`: spoken questions in, thinking, text and speech out, over one or several turns."""

from __future__ import annotations

import json as json_format
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import soundfile

from lightning_echat.contracts import DialogueSample, GeneratedReply, SampleRejected, Turn, UserError
from lightning_echat.data.batching import collate
from lightning_echat.data.decoding import decode_waveform
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.nn.token2wav.interface import Token2Wav, load_token2wav
from lightning_echat.nn.weights import TrainedModel, load_trained
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
    """

    query: str
    thinking: dict[str, Any]
    text: str
    audio: str | None
    seconds: float
    finished: bool
    timings: dict[str, float] = field(default_factory=dict)


def chat(
    checkpoint: Path,
    audio: list[Path],
    out: Path | None = None,
    *,
    json: bool = False,
    thinking: ThinkingForm = "label",
    layout: Literal["sequential", "interleaved"] = "sequential",
    speech_tokenizer: Path | None = None,
    decoding: DecodingConfig | None = None,
) -> None:
    """Answer one spoken question, or several as the turns of one conversation.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or one of echat convert.
        audio: Wav or FLAC files, one a turn; any sample rate.
        out: The wav file to write; with several turns their numbers are added to its name. Without it the model
            answers in text alone, and no speech tokenizer is needed.
        json: Print JSON instead of text.
        thinking: Form of the thinking before the reply.
        layout: Order of text and speech in the reply.
        speech_tokenizer: Folder of the speech tokenizer, where the checkpoint names none that still exists.
        decoding: Lengths, sampling and seed.
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
    task = spoken if voice is not None else DialogueTask(kind="speech_to_text", thinking=thinking)
    answers: list[ChatAnswer] = []
    turns: list[Turn] = []
    log_mel = LogMel(mel_bins=trained.tokens.mel_bins)
    for number, (path, waveform) in enumerate(zip(audio, waveforms, strict=True), start=1):
        started = time.perf_counter()
        turns.append(Turn(role="user", log_mel=log_mel(waveform)))
        features = time.perf_counter() - started
        reply = _answer(trained, turns, task, decoding or DecodingConfig())
        parsed = parse_thinking(reply.text, trained.tokenizer.prompt_set.thinking)
        words = parsed.reply if thinking != "none" else reply.text.strip()
        codes = reply.speech_codes if reply.speech_codes.numel() else None
        turns.append(Turn(role="assistant", text=words, speech_codes=codes))
        answer = ChatAnswer(
            query=str(path),
            thinking={k: v for k, v in asdict(parsed).items() if k != "reply"} if thinking != "none" else {},
            text=words,
            audio=None,
            seconds=0.0,
            finished=reply.finished,
            timings={"features": features, **reply.timings},
        )
        if voice is not None and out is not None:
            target = out if len(audio) == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
            answer = _speak(answer, reply, voice, target)
        answers.append(answer)
        if not json:
            _print(answers[-1], number=number)
    if json:
        sys.stdout.write(json_format.dumps({"turns": [asdict(a) for a in answers]}, ensure_ascii=False) + "\n")


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


def _answer(trained: TrainedModel, turns: list[Turn], task: DialogueTask, config: DecodingConfig) -> GeneratedReply:
    sample = DialogueSample(turns=list(turns), key="chat")
    prompt = trained.tokenizer.prompt(sample, task)
    batch = collate([prompt], padding=trained.tokenizer.vocabulary.padding, mel_bins=trained.tokens.mel_bins)
    return generate(trained.model, batch, trained.tokenizer, config)[0]


def _speak(answer: ChatAnswer, reply: GeneratedReply, voice: Token2Wav, target: Path) -> ChatAnswer:
    """Turn the codes into a waveform and write it; an answer without codes stays silent."""
    if reply.speech_codes.numel() == 0:
        return answer
    started = time.perf_counter()
    waveform = voice.decode(reply.speech_codes)
    spent = time.perf_counter() - started
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial" + target.suffix)
    soundfile.write(partial, waveform.numpy(), voice.sample_rate)
    partial.replace(target)
    seconds = waveform.shape[0] / voice.sample_rate
    return replace(answer, audio=str(target), seconds=seconds, timings={**answer.timings, "token2wav": spent})


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
    lines.append("  time    " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in answer.timings.items()))
    sys.stdout.write("\n".join(lines) + "\n")
