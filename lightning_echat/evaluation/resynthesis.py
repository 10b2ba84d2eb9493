"""`echat evaluate resynthesis`: recorded replies as codes and back to sound, heard by a recogniser before and after.

What the codes and token-to-speech lose is the difference of the two figures; what the recogniser cannot do is in both.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchaudio.functional import resample

from lightning_echat.contracts import SAMPLE_RATE, SampleRejected, UserError
from lightning_echat.data.decoding import ParsedDialogue, decode_waveform, parse_dialogue
from lightning_echat.data.files import write_json
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, expand_shards, read_shard
from lightning_echat.evaluation.bootstrap import bootstrap_interval
from lightning_echat.evaluation.recognisers import POCKETSPHINX, SpeechRecogniser, open_recogniser
from lightning_echat.evaluation.records import nan_as_none
from lightning_echat.evaluation.speech_quality import error_rates, mel_distance, word_errors
from lightning_echat.evaluation.summary import write_report_json
from lightning_echat.metrics import normalize_english
from lightning_echat.nn.token2wav.interface import Token2Wav, load_token2wav

FILE = "resynthesis.json"


@dataclass(slots=True, kw_only=True)
class RecordedReply:
    """A reply of a shard: its words, its codes, and its [samples] at 16 kHz."""

    key: str
    text: str
    codes: Tensor
    waveform: Tensor


def resynthesis(
    shards: list[str],
    token2wav: Path,
    out: Path,
    *,
    recogniser: str = POCKETSPHINX,
    items: int = 32,
    known_texts: bool = True,
    max_seconds: float = 20.0,
) -> None:
    """Measure what is lost between recorded speech and the same from its codes.

    Writes OUT/resynthesis.json, and its figures into the "speech" section of OUT/report.json where that exists.

    Args:
        shards: Held-out shards, with replies as audio and as codes.
        token2wav: Folder of what speaks the codes.
        out: The run folder.
        recogniser: pocketsphinx, the name or folder of a Hugging Face model, or stage:RUN.
        items: Replies, spread evenly over the shards.
        known_texts: Let pocketsphinx know which words and trigrams the replies of the shards hold.
        max_seconds: Longer replies are skipped and counted.
    """
    counter = SkipCounter()
    replies = _recorded(shards, counter, max_seconds=max_seconds)
    if not replies:
        raise UserError(f"the shards hold no reply with text, audio and codes: {counter.summary()}")
    voice = load_token2wav(token2wav)
    texts = sorted({reply.text for reply in replies}) if known_texts else []
    listener = open_recogniser(recogniser, texts=texts)
    places = np.linspace(0, len(replies) - 1, min(items, len(replies))).round().astype(int)
    chosen = [replies[place] for place in places]
    figures = {
        "token2wav": str(token2wav),
        "skipped": counter.skipped,
        **compare(chosen, voice, listener),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / FILE, content=nan_as_none(figures))
    _join(out / "report.json", figures)
    Console().print(
        f"{listener.name}: WER {_percent(figures['wer'])} of {figures['items']} replies from codes, "
        f"{_percent(figures['wer_of_recordings'])} of the recordings; "
        f"mel distance {figures['mel_distance_db']:.2f} dB",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def compare(replies: list[RecordedReply], voice: Token2Wav, listener: SpeechRecogniser) -> dict[str, Any]:
    """The figures of `resynthesis`. Words are compared as `normalize_english` leaves them."""
    made, started = [], time.perf_counter()
    for reply in track(replies, description="speaking codes", transient=True):
        made.append(voice.decode(reply.codes).cpu())
    seconds = time.perf_counter() - started
    length = sum(waveform.numel() for waveform in made) / voice.sample_rate
    heard = listener.transcribe(made, sample_rate=voice.sample_rate)
    heard_of_recordings = listener.transcribe([reply.waveform for reply in replies], sample_rate=SAMPLE_RATE)
    errors = [word_errors(reply.text, words) for reply, words in zip(replies, heard, strict=True)]
    before = [word_errors(reply.text, words) for reply, words in zip(replies, heard_of_recordings, strict=True)]
    distances = [
        mel_distance(_at(waveform, voice.sample_rate), reply.waveform, sample_rate=SAMPLE_RATE, aligned=True)
        for waveform, reply in zip(made, replies, strict=True)
    ]
    rates, rates_before = error_rates(errors), error_rates(before)
    differences = [(a.errors - b.errors) / a.words for a, b in zip(errors, before, strict=True) if a.words]
    return {
        "recogniser": listener.name,
        "independent": listener.independent,
        "items": len(replies),
        "wer": rates["wer"],
        "cer": rates["cer"],
        "wer_of_recordings": rates_before["wer"],
        "cer_of_recordings": rates_before["cer"],
        "mean_wer_difference": list(bootstrap_interval(differences, seed=0)),
        "mel_distance_db": float(np.nanmean(distances)),
        "real_time_factor": seconds / length if length else float("nan"),
    }


def _recorded(shards: list[str], counter: SkipCounter, *, max_seconds: float) -> list[RecordedReply]:
    """All replies with words, codes and audio; dialogues that cannot be read are counted by reason."""
    found = []
    for path in expand_shards(shards):
        for stored in read_shard(ShardPart(path=path), counter=counter):
            try:
                found += _of_dialogue(parse_dialogue(stored), max_seconds=max_seconds)
                counter.keep()
            except SampleRejected as error:
                counter.reject(error, shard=stored.shard, key=stored.key)
    return found


def _of_dialogue(parsed: ParsedDialogue, *, max_seconds: float) -> list[RecordedReply]:
    found = []
    for turn, audio in zip(parsed.sample.turns, parsed.audio, strict=True):
        complete = audio is not None and turn.speech_codes is not None and normalize_english(turn.text)
        if turn.role == "assistant" and complete:
            assert audio is not None and turn.speech_codes is not None
            waveform = decode_waveform(audio, max_seconds=max_seconds)
            found.append(
                RecordedReply(key=parsed.sample.key, text=turn.text, codes=turn.speech_codes, waveform=waveform)
            )
    return found


def _join(report: Path, figures: dict[str, Any]) -> None:
    """Put the figures into the speech section of a report that is there."""
    if not report.is_file():
        return
    content = json.loads(report.read_text(encoding="utf-8"))
    content["speech"] = {**(content.get("speech") or {}), "resynthesis": figures}
    write_report_json(report, content)


def _at(waveform: Tensor, sample_rate: int) -> Tensor:
    return waveform if sample_rate == SAMPLE_RATE else resample(waveform, sample_rate, SAMPLE_RATE)


def _percent(rate: float) -> str:
    return "no data" if rate != rate else f"{100 * rate:.1f} %"
