"""What the data engine costs: `python benchmarks/data_pipeline.py`.

Makes shards, then prints samples and seconds of audio per CPU-second: of a plain pipeline (tarfile, soundfile,
torchaudio's mel, a sample at a time) as the baseline, of each part of the engine, and of the whole with worker
processes, padded and packed, mels in the worker and left to the device. Ratios are to the baseline with mels, in
the second table measured before and after each row, as a busy machine slows CPUs down too.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import soundfile
import torch
import torchaudio
from rich.console import Console
from rich.table import Table

from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import BatchingConfig, Window, pack_rows
from lightning_echat.data.decoding import parse_dialogue, with_audio
from lightning_echat.data.dialogue_stream import DialogueReader, ReadingConfig
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.log_mel import LogMel
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.read_errors import SkipCounter
from lightning_echat.data.shards import ShardPart, read_shard
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.data.writers import ShardWriter
from lightning_echat.testing import dummy_audio, dummy_dialogue, tiny_tokens_config

TASK = TaskConfig(kind="speech_to_speech", thinking="natural")
REFERENCE = 107
"""The public implementation's samples per CPU-second, measured once on one core with shards of this kind."""
PLAIN_BESIDE_REFERENCE = {"tar": 2476, "tar, wav": 1122, "tar, wav, mel": 359}
"""What plain pipelines gave there and then; the issue that asked for this engine has these figures."""
REFERENCE_SHARE = REFERENCE / PLAIN_BESIDE_REFERENCE["tar, wav, mel"]
MEDIAN_SECONDS, SPREAD = 4.0, 0.5


@dataclass(slots=True)
class Speed:
    """Work done and CPU time taken."""

    samples: int = 0
    audio_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def timed(self, work: Callable[[], Any]) -> Any:
        """Do the work and add its time."""
        begin = time.process_time()
        result = work()
        self.cpu_seconds += time.process_time() - begin
        return result

    @property
    def rate(self) -> float:
        """Samples per CPU-second."""
        return self.samples / self.cpu_seconds


def make_shards(folder: Path, *, samples: int) -> None:
    """Speech→speech dialogues with thinking; queries of log-normal length, 16-bit wav."""
    random = Random(0)
    with ShardWriter(folder, dialogues_per_shard=100) as writer:
        for number in range(samples):
            seconds = min(max(random.lognormvariate(math.log(MEDIAN_SECONDS), SPREAD), 0.5), 25.0)
            dialogue = dummy_dialogue(number, seconds=0.1)
            dialogue.turns[0] = replace(dialogue.turns[0], audio=dummy_audio(seconds, seed=number))
            writer.write(dialogue)


def plain_pipeline(paths: Sequence[Path]) -> dict[str, Speed]:
    """The baseline: what a short script would do, one sample after the other."""
    mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=400, hop_length=160, n_mels=80, norm="slaney")
    steps: dict[str, list[Callable[[list[bytes]], Any]]] = {
        "tar": [],
        "tar, wav": [_decode_plainly],
        "tar, wav, mel": [_decode_plainly, lambda decoded: mel(decoded[1]).clamp_min(1e-10).log10()],
    }
    speeds: dict[str, Speed] = {}
    for name, functions in steps.items():
        speed = speeds[name] = Speed()
        begin = time.process_time()
        for members in _plain_members(paths):
            value: Any = members
            for function in functions:
                value = function(value)
            speed.samples += 1
        speed.cpu_seconds = time.process_time() - begin
    return speeds


def plain_speed(paths: Sequence[Path]) -> Speed:
    """The baseline alone, to be measured beside each run: neighbours on the machine slow CPUs down as well."""
    return plain_pipeline(paths)["tar, wav, mel"]


def _plain_members(paths: Sequence[Path]) -> Iterator[list[bytes]]:
    """Sidecar and audio of each sample."""
    for path in paths:
        with tarfile.open(path) as tar:
            held: list[bytes] = []
            for info in tar:
                file = tar.extractfile(info)
                assert file is not None
                held.append(file.read())
                if len(held) == 2:
                    yield held
                    held = []


def _decode_plainly(members: list[bytes]) -> tuple[Any, torch.Tensor]:
    audio, _ = soundfile.read(io.BytesIO(members[1]), dtype="float32")
    return json.loads(members[0]), torch.from_numpy(audio)


def parts(paths: Sequence[Path], config: ReadingConfig) -> dict[str, Speed]:
    """Each part of the engine by itself, in this process. A shard goes through all of them before the next."""
    reader = DialogueReader(config)
    log_mel, counter, window = LogMel(mel_bins=80), SkipCounter(), Window[None](config.batching)
    speeds = {name: Speed() for name in ("tar", "sidecar", "wav", "mel", "template, tokenizer", "batching")}
    for path in paths:
        stored = speeds["tar"].timed(lambda path=path: list(read_shard(ShardPart(path=str(path)), counter=counter)))
        parsed = speeds["sidecar"].timed(lambda stored=stored: [parse_dialogue(sample) for sample in stored])
        decoded = speeds["wav"].timed(
            lambda parsed=parsed: [with_audio(one, turns=[0], max_seconds=30.0, counter=counter) for one in parsed]
        )
        mels = speeds["mel"].timed(lambda decoded=decoded: [log_mel(sample.turns[0].audio) for sample in decoded])
        for sample, mel in zip(decoded, mels, strict=True):
            sample.turns[0] = replace(sample.turns[0], log_mel=mel)
        dialogues = speeds["template, tokenizer"].timed(
            lambda decoded=decoded: [reader.tokenizer.tokenize(sample, TASK.task) for sample in decoded]
        )
        for dialogue in dialogues:
            window.add(dialogue, None)
        audio_seconds = sum(len(mel) for mel in mels) / 100
        for name in ("tar", "sidecar", "wav", "mel", "template, tokenizer"):
            speeds[name].samples += len(stored)
            speeds[name].audio_seconds += audio_seconds
    _batch_everything(window, speeds["batching"], padding=reader.padding)
    return speeds


def _batch_everything(window: Window[None], speed: Speed, *, padding: int) -> None:
    while rows := speed.timed(window.take):
        batch = speed.timed(lambda rows=rows: pack_rows(rows, padding=padding))
        speed.samples += len(batch.references)
        speed.audio_seconds += batch.audio_seconds


@dataclass(slots=True, kw_only=True)
class Whole:
    """A run of the loader.

    Attributes:
        worker, trainer: CPU time of the reading processes, and of the one that takes their batches; the same samples.
        memory: Bytes that a worker has for itself, the largest.
        waited: Share of its time that the trainer waited for a batch.
        padded_ids, padded_frames: Shares of padding among ids and mel frames.
    """

    worker: Speed
    trainer: Speed
    memory: int
    waited: float
    padded_ids: float
    padded_frames: float


def whole(config: ReadingConfig, source: SourceConfig, *, workers: int, samples: int, step_seconds: float) -> Whole:
    """Read with a trainer that takes `step_seconds` a batch, from the second batch on, when all buffers are full."""
    batches = iter(TrainingLoader(TrainingStream(config, sources=[source]), num_workers=workers))
    for _ in range(2 * workers):
        next(batches)
    processes = psutil.Process().children()
    before, own, begin = _cpu_seconds(processes), time.process_time(), time.perf_counter()
    waited, seen, taken = 0.0, Speed(), []
    while seen.samples < samples:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        seen.samples += len(batch.references)
        seen.audio_seconds += batch.audio_seconds
        taken.append(_padding(batch))
        time.sleep(step_seconds)
    elapsed = time.perf_counter() - begin
    ids, real_ids, frames, real_frames = (sum(column) for column in zip(*taken, strict=True))
    result = Whole(
        worker=replace(seen, cpu_seconds=_cpu_seconds(processes) - before),
        trainer=replace(seen, cpu_seconds=time.process_time() - own),
        memory=max(process.memory_full_info().uss for process in processes),
        waited=waited / elapsed,
        padded_ids=1 - real_ids / ids,
        padded_frames=1 - real_frames / frames,
    )
    del batches  # ends the workers
    return result


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def _padding(batch: PackedBatch) -> tuple[int, int, int, int]:
    """Ids, those that are no padding, mel frames, those that are none."""
    frames = batch.log_mels.shape[0] * batch.log_mels.shape[1]
    return batch.input_ids.numel(), batch.num_tokens, frames, int(batch.log_mel_lengths.sum())


def lost(config: ReadingConfig, source: SourceConfig, *, samples: int) -> int:
    """Samples that one pass with two workers does not yield exactly once."""
    loader = TrainingLoader(TrainingStream(config, sources=[replace(source, repeat=False)]), num_workers=2)
    keys = [reference.key for batch in loader for reference in batch.references]
    return abs(len(keys) - len(set(keys))) + samples - len(set(keys))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--step-seconds", type=float, default=0.05, help="what the trainer does with each batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(highlight=False, width=120)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options, console)


def measure(folder: Path, options: argparse.Namespace, console: Console) -> None:
    """Everything, on shards in `folder`."""
    make_shards(folder / "shards", samples=options.samples)
    paths = sorted((folder / "shards").glob("*.tar"))
    config = ReadingConfig(tokens=tiny_tokens_config(folder / "tokenizer"))
    source = SourceConfig(shards=[str(folder / "shards")], tasks=[TASK])
    plain = plain_pipeline(paths)
    baseline = plain["tar, wav, mel"]
    found = parts(paths, config)
    audio_seconds = found["mel"].audio_seconds
    console.print(
        f"{options.samples} samples, {audio_seconds / options.samples:.2f} s of audio each; "
        f"torch {torch.__version__}; baseline: plain tar, wav, mel"
    )
    table = Table("part", "samples / CPU s", "audio s / CPU s", "x baseline")
    for name, speed in plain.items():
        _row(table, f"plain: {name}", replace(speed, audio_seconds=audio_seconds), baseline)
    for name, speed in found.items():
        _row(table, f"engine: {name}", speed, baseline)
    console.print(table)
    console.print("the public implementation's 107 a CPU-second, scaled to this machine: " + _scaled_reference(plain))
    table = Table("batches", "mels in", "workers", "samples / CPU s", "audio s / CPU s", "x base", "x ref.*",
                  "workers alone", "MB each", "waited", "padded ids", "frames")  # fmt: skip
    for packed in (False, True):
        for on_device in (False, True):
            setting = replace(config, batching=BatchingConfig(packed=packed), mels_on_device=on_device)
            for workers in options.workers:
                before = plain_speed(paths)
                result = whole(setting, source, workers=workers, samples=options.samples,
                               step_seconds=options.step_seconds)  # fmt: skip
                rate = (before.rate + plain_speed(paths).rate) / 2
                names = ("packed" if packed else "padded", "device" if on_device else "worker", str(workers))
                table.add_row(*names, *_columns(result, rate))
    console.print(table)
    console.print("* scaled by plain tar, wav, mel, as measured beside each row")
    console.print(f"{lost(config, source, samples=options.samples)} of {options.samples} samples lost or repeated")


def _scaled_reference(plain: dict[str, Speed]) -> str:
    """What it would be by each of the plain pipelines: machines are not faster in everything by the same factor."""
    scaled = {name: REFERENCE * plain[name].rate / there for name, there in PLAIN_BESIDE_REFERENCE.items()}
    return ", ".join(f"{speed:.0f} by plain {name}" for name, speed in scaled.items())


def _row(table: Table, name: str, speed: Speed, baseline: Speed) -> None:
    audio = speed.audio_seconds / speed.cpu_seconds
    table.add_row(name, f"{speed.rate:,.0f}", f"{audio:,.0f}", f"{speed.rate / baseline.rate:.2f}")


def _columns(result: Whole, baseline: float) -> list[str]:
    """What the table says of a run; `baseline` in samples per CPU-second."""
    both = replace(result.worker, cpu_seconds=result.worker.cpu_seconds + result.trainer.cpu_seconds)
    return [
        f"{both.rate:,.0f}",
        f"{both.audio_seconds / both.cpu_seconds:,.0f}",
        f"{both.rate / baseline:.2f}",
        f"{both.rate / baseline / REFERENCE_SHARE:.1f}",
        f"{result.worker.rate:,.0f}",
        f"{result.memory / 1e6:,.0f}",
        f"{result.waited:.0%}",
        f"{result.padded_ids:.1%}",
        f"{result.padded_frames:.1%}",
    ]


if __name__ == "__main__":
    main()
