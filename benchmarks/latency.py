"""How long a user waits: for the first word, the first code, the first sound, and between pieces of sound.

    python -m benchmarks.latency
    python -m benchmarks.latency --checkpoint runs/quickstart/empathy --requests 1 4
    python -m benchmarks.latency --size 3b --device cuda --precision bf16 --out benchmarks/results/latency_3b.json

Without a checkpoint the network has random weights and the sizes of the quickstart. It would never end its thinking, so
what it writes is replaced, after it has been computed, by a script of usual lengths. Times are medians over answers.
Baselines, measured in the same run: "at once" writes the whole answer and then makes its sound; "one by one" answers
the dialogues of a batch singly.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import yaml
from lightning.fabric.utilities import move_data_to_device

from benchmarks.networks import SIZES, network_of, tokens_of
from lightning_echat import decoding
from lightning_echat.contracts import DialogueSample, PackedBatch, TokenizedDialogue, Turn
from lightning_echat.data.batching import collate
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.evaluation.chat import open_voice
from lightning_echat.evaluation.machine import machine_facts
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.token2wav.interface import Token2Wav
from lightning_echat.nn.token2wav.kmeans import FRAMES_PER_CODE, MEL_BINS, FitReport, KMeansSpeechTokenizer
from lightning_echat.nn.weights import load_trained, network_from_settings
from lightning_echat.reply_writer import ReplyWriter
from lightning_echat.streaming import AnswerTiming, stream_answer
from lightning_echat.testing import dummy_audio, tiny_tokens_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import DialogueTask

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart" / "small.yaml"
_THINKING_IDS, _TEXT_IDS, _CODES = 40, (8, 16), (50, 100)
"""Of a scripted answer. 100 codes are 4 s."""


@dataclass(slots=True, kw_only=True)
class Subject:
    """What is measured."""

    model: EChatModel
    tokenizer: DialogueTokenizer
    tokens: TokensConfig
    voice: Token2Wav
    config: DecodingConfig
    device: torch.device
    scripted: bool


class ScriptedWriter(ReplyWriter):
    """Writes answers of usual lengths, whatever the heads chose; row after row is a little longer."""

    def __init__(self, *args: Any, numbers: Iterator[int]) -> None:
        super().__init__(*args)
        number = next(numbers)
        thinking = self._tokenizer.prompt_set.thinking
        spelled = thinking.open + "x" * (_THINKING_IDS - len(thinking.open + thinking.close)) + thinking.close
        words = _spread(_TEXT_IDS, number) * "y"
        self._text = self._tokenizer.encode((spelled if self._thinking else "") + words)
        self._codes = _spread(_CODES, number)

    def write(self, id: int) -> None:
        """Take the script's id instead."""
        vocabulary, counts = self._tokenizer.vocabulary, self._counts
        if self.phase == "speech":
            over = counts["speech"] > self._codes
            code = id if id != vocabulary.speech_boundary or counts["speech"] == 0 else vocabulary.first_code
            super().write(vocabulary.speech_boundary if over else code)
            return
        at = counts["thinking"] + counts["text"]
        super().write(self._text[at] if at < len(self._text) else vocabulary.end_of_text)


def _spread(span: tuple[int, int], number: int) -> int:
    return span[0] + number * 7 % (span[1] - span[0] + 1)


@contextmanager
def scripted(subject: Subject) -> Iterator[None]:
    """Within, random networks give answers of usual lengths."""
    numbers = iter(range(1_000_000))
    writer = partial(ScriptedWriter, numbers=numbers)
    with mock.patch.object(decoding, "ReplyWriter", writer) if subject.scripted else nullcontext():
        yield


def questions(subject: Subject, task: DialogueTask, count: int) -> list[TokenizedDialogue]:
    """Prompts: spoken questions of 1 to 3 seconds."""
    log_mel = LogMel(mel_bins=subject.tokens.mel_bins)
    prompts = []
    for number in range(count):
        audio = dummy_audio(1.0 + number * 0.7 % 2.0, seed=number)
        turn = Turn(role="user", log_mel=log_mel(audio))
        prompts.append(subject.tokenizer.prompt(DialogueSample(turns=[turn], key=f"q{number}"), task))
    return prompts


def batch_of(subject: Subject, prompts: Sequence[TokenizedDialogue]) -> PackedBatch:
    """On the device, mels included."""
    padding = subject.tokenizer.vocabulary.padding
    batch = collate(list(prompts), padding=padding, mel_bins=subject.tokens.mel_bins)
    return move_data_to_device(batch, subject.device)


def stream_all(subject: Subject, batches: Sequence[PackedBatch], *, at_a_time: int) -> tuple[list[AnswerTiming], float]:
    """Stream an answer to each, so many at a time in threads; their times, and seconds of sound a second together."""

    def answer(batch: PackedBatch) -> AnswerTiming:
        events = stream_answer(subject.model, batch, subject.tokenizer, subject.config, token2wav=subject.voice)
        timing = list(events)[-1].timing
        assert timing is not None
        return timing

    started = time.perf_counter()
    with scripted(subject), ThreadPoolExecutor(at_a_time) as pool:
        timings = list(pool.map(answer, batches))
    return timings, sum(timing.audio for timing in timings) / (time.perf_counter() - started)


def at_once(subject: Subject, batches: Sequence[PackedBatch], *, at_a_time: int) -> float:
    """The baseline: median seconds until the first sound where the whole answer is written before any is made."""

    def answer(batch: PackedBatch) -> float | None:
        started = time.perf_counter()
        (reply,) = generate(subject.model, batch, subject.tokenizer, subject.config)
        if reply.speech_codes.numel() == 0:
            return None
        subject.voice.decode(reply.speech_codes)
        return time.perf_counter() - started

    with scripted(subject), ThreadPoolExecutor(at_a_time) as pool:
        seconds = [found for found in pool.map(answer, batches) if found is not None]
    return median(seconds) if seconds else float("nan")


def summary_of(timings: Sequence[AnswerTiming]) -> dict[str, float | None]:
    """The median of every figure over the answers that have it."""
    rows = [asdict(timing) for timing in timings]
    found = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: median(values) if values else None for name, values in found.items()}


def measure_streams(subject: Subject, *, answers: int, requests: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each layout, with and without thinking, and each number of requests at a time."""
    results = []
    for layout in ("sequential", "interleaved"):
        for thinking in ("none", "label"):
            task = DialogueTask(kind="speech_to_speech", thinking=thinking, layout=layout)
            batches = [batch_of(subject, [prompt]) for prompt in questions(subject, task, answers)]
            stream_all(subject, batches[:1], at_a_time=1)
            for number in requests:
                baseline = at_once(subject, batches, at_a_time=number)
                timings, throughput = stream_all(subject, batches, at_a_time=number)
                medians = summary_of(timings)
                first = medians["first_audio"]
                results.append(
                    {
                        "layout": layout,
                        "thinking": thinking,
                        "requests": number,
                        "answers": len(timings),
                        "median": medians,
                        "first_audio_at_once": baseline,
                        "sooner_than_at_once": baseline / first if first else None,
                        "audio_seconds_per_second": throughput,
                    }
                )
                show_stream(results[-1])
    return results


_COLUMNS = (
    ("prefill", "prefill"),
    ("ids", "thinking_ids"),
    ("thinking", "thinking"),
    ("1st text", "first_text"),
    ("1st code", "first_code"),
    ("1st sound", "first_audio"),
    ("after think", "first_audio_after_thinking"),
    ("codes rtf", "codes_rtf"),
    ("t2w rtf", "token2wav_rtf"),
    ("stalls", "stalls"),
    ("longest", "longest_stall"),
)


def show_header() -> None:
    say(
        f"{'layout':<12}{'thinking':<9}{'at a time':>9}  "
        + "".join(f"{name:>12}" for name, _ in _COLUMNS)
        + "  vs at once"
    )


def show_stream(result: dict[str, Any]) -> None:
    values = (result["median"][key] for _, key in _COLUMNS)
    cells = "".join(f"{'-':>12}" if value is None else f"{value:>12.3f}" for value in values)
    ratio = result["sooner_than_at_once"]
    told = f"{ratio:.1f}x sooner" if ratio else "no sound"
    say(f"{result['layout']:<12}{result['thinking']:<9}{result['requests']:>9}  {cells}  {told}")


def measure_batch(subject: Subject, *, rows: int, repeats: int) -> dict[str, Any]:
    """Ids a second of `rows` dialogues answered together, and of the same ones by one."""
    task = DialogueTask(kind="speech_to_speech", thinking="label")
    prompts = questions(subject, task, rows)
    together, single = batch_of(subject, prompts), [batch_of(subject, [prompt]) for prompt in prompts]

    def ids_a_second(batches: Sequence[PackedBatch]) -> float:
        with scripted(subject):
            started = time.perf_counter()
            replies = [
                reply
                for batch in batches
                for reply in generate(subject.model, batch, subject.tokenizer, subject.config)
            ]
            seconds = time.perf_counter() - started
        return sum(len(reply.text_ids) + len(reply.speech_codes) for reply in replies) / seconds

    ids_a_second(single[:1])
    # In turn, so that what else the machine does meets both alike.
    pairs = [(ids_a_second([together]), ids_a_second(single)) for _ in range(repeats)]
    result = {
        "rows": rows,
        "ids_per_second": median(batched for batched, _ in pairs),
        "ids_per_second_one_by_one": median(alone for _, alone in pairs),
        "ratio": median(batched / alone for batched, alone in pairs),
    }
    say(
        f"batch of {rows}: {result['ids_per_second']:.0f} ids/s, one by one {result['ids_per_second_one_by_one']:.0f}: "
        f"{result['ratio']:.1f}x"
    )
    return result


def random_subject(size: str, *, device: torch.device, dtype: torch.dtype, folder: Path) -> Subject:
    """A network of that size with random weights, and a voice with a random codebook."""
    if size == "quickstart":
        settings = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]
        tokens = replace(tiny_tokens_config(folder), **_as_tuples(settings["tokens"]))
        network = settings["network"]
        llm = {"lora": None, **network["llm"]}
        config = network_from_settings({**network, "llm": llm})
    else:
        tokens, config = tokens_of(SIZES[size], folder), network_of(SIZES[size], recompute=False)
    tokenizer = DialogueTokenizer.from_config(tokens)
    torch.manual_seed(0)
    with device:
        model = EChatModel(config, tokens=tokens, vocabulary=tokenizer.vocabulary).to(dtype).eval()
    codebook = 0.5 * torch.randn(tokens.codebook_size, FRAMES_PER_CODE * MEL_BINS) - 5.0
    report = FitReport(blocks=0, perplexity=0.0, dead=0, seed=0)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        tokens=tokens,
        voice=KMeansSpeechTokenizer(codebook, report=report),
        config=DecodingConfig(max_text_ids=128, max_speech_ids=256),
        device=device,
        scripted=True,
    )


def _as_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def trained_subject(path: Path, *, device: torch.device, dtype: torch.dtype, voice: Path | None) -> Subject:
    """A checkpoint and the voice that it was trained with, or the one given."""
    trained = load_trained(path)
    return Subject(
        model=trained.model.to(device=device, dtype=dtype),
        tokenizer=trained.tokenizer,
        tokens=trained.tokens,
        voice=open_voice(trained, voice),
        config=DecodingConfig(max_text_ids=128, max_speech_ids=256),
        device=device,
        scripted=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint:
            subject = trained_subject(options.checkpoint, device=device, dtype=dtype, voice=options.speech_tokenizer)
        else:
            subject = random_subject(options.size, device=device, dtype=dtype, folder=Path(folder))
    what = str(options.checkpoint) if options.checkpoint else f"{options.size}, random weights, scripted answers"
    say(f"{what}; {options.device}, {options.precision}, {options.threads} threads")
    say(f"seconds, medians of {options.answers} answers")
    show_header()
    streams = measure_streams(subject, answers=options.answers, requests=options.requests)
    batch = measure_batch(subject, rows=options.batch, repeats=options.repeats)
    if options.out:
        report = {
            "subject": what,
            "device": options.device,
            "precision": options.precision,
            "threads": options.threads,
            "machine": machine_facts(),
            "streams": streams,
            "batch": batch,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial_file = options.out.with_suffix(".tmp")
        partial_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial_file.replace(options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint, run folder or converted folder")
    parser.add_argument("--speech_tokenizer", type=Path, help="its voice, where the checkpoint names none that exists")
    parser.add_argument("--size", default="quickstart", choices=["quickstart", *SIZES], help="without a checkpoint")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; the sound is made on the CPU")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4], help="answers streamed at a time")
    parser.add_argument("--answers", type=int, default=8, help="of each kind")
    parser.add_argument("--batch", type=int, default=16, help="rows answered together")
    parser.add_argument("--repeats", type=int, default=3, help="of the batched measurement")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    return parser.parse_args(arguments)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
