"""What a training step costs: tokens a second, where the time goes, and the peak of memory in each phase.

    python -m benchmarks.train_step --size small --rows 1 2 4
    torchrun --standalone --nproc-per-node 2 -m benchmarks.train_step --strategy fsdp --rows 2
    python -m benchmarks.train_step --size 3b --recompute --rows 4 8 16 --out benchmarks/results/3b.json

Dialogues are synthesized, weights random. The first entry of --rows is the baseline of the ratios; one that does not
fit is told and passed over. On a GPU compute is bfloat16 and MFU counts ids that are not padding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks import SIZES, Size, network_of, tokens_of
from callbacks.token_throughput import peak_flops
from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import pack_rows
from lightning_echat.nn.deferred_init import local
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.stages.base import EChatStage
from lightning_echat.stages.empathy import EmpathyStage
from lightning_echat.testing import dummy_tokenized
from lightning_echat.tokens.dialogue_template import DialogueTokenizer
from lightning_echat.tokens.tasks import task_from_name

PHASES = ("forward", "backward", "optimizer")
_WARM_UP = 2


@dataclass(kw_only=True)
class StepCost:
    """Measured on one rank.

    Attributes:
        seconds: Of each phase and of waiting for data, a step.
        tokens, supervised: Ids a step that are not padding, and those that are learned.
        held_bytes: Of parameters, gradients and optimizer state that this rank holds, when a step is over.
        static_bytes: Of what it holds between steps: gradients are given up.
        peak_bytes: Of each phase, static included.
        communication: Seconds in collective calls, a step; they may overlap with computing.
        flops: Floating-point operations of a step.
        used_share: Ids that are not padding among a batch's positions.
        positions: Of a batch, padding included.
        frames: Encoder frames of a batch, padding included.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    supervised: float = 0.0
    held_bytes: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    communication: float = 0.0
    flops: float = 0.0
    used_share: float = 0.0
    positions: int = 0
    frames: int = 0


class MeasureSteps(Callback):
    """Takes the time of each phase; the last step is run under the profiler and not timed."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.cost = StepCost(seconds=dict.fromkeys(("data", *PHASES), 0.0))
        self._last = 0.0
        self._profiler: profile | None = None
        self._flops: FlopCounterMode | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PackedBatch, batch_idx: int
    ) -> None:
        self._mark("data", pl_module)
        if batch_idx == 0:
            self._flops = FlopCounterMode(display=False)
            self._flops.__enter__()
        if batch_idx == self.steps - 1:
            self.cost.held_bytes = held_bytes(pl_module, trainer)
            self.cost.static_bytes = sum(self.cost.held_bytes.values()) - self.cost.held_bytes["gradients"]
            # The profiler does not see what it has not seen allocated being freed.
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
            self._last = time.perf_counter()
        self._enter("forward", pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._mark("forward", pl_module)
        self._enter("backward", pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark("backward", pl_module)
        self._enter("optimizer", pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        self._mark("optimizer", pl_module)
        if self._flops is not None:
            self._flops.__exit__(None, None, None)
            self.cost.flops, self._flops = float(self._flops.get_total_flops()), None
        if batch_idx == _WARM_UP - 1:
            self.cost.seconds = dict.fromkeys(self.cost.seconds, 0.0)
        elif self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            self._read_profile(pl_module)
        elif batch_idx >= _WARM_UP:
            timed = self.steps - _WARM_UP - 1
            tokens = int((batch.document_ids > 0).sum())
            self.cost.tokens += tokens / timed
            self.cost.supervised += batch.num_supervised / timed
            self.cost.positions = batch.input_ids.numel()
            self.cost.frames = batch.log_mels.shape[0] * batch.log_mels.shape[1] // 2
            self.cost.used_share += tokens / self.cost.positions / timed

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        timed = self.steps - _WARM_UP - 1
        self.cost.seconds = {name: spent / timed for name, spent in self.cost.seconds.items()}

    def _enter(self, phase: str, stage: LightningModule) -> None:
        with record_function(f"phase/{phase}"):
            pass
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(stage.device)

    def _mark(self, phase: str, stage: LightningModule) -> None:
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
            self.cost.peak_bytes[phase] = torch.cuda.max_memory_allocated(stage.device)
        now = time.perf_counter()
        if self._profiler is None:
            self.cost.seconds[phase] += now - self._last
        self._last = now

    def _read_profile(self, stage: LightningModule) -> None:
        """Peaks of the allocator in each phase, on a CPU; and the time in collective calls."""
        assert self._profiler is not None and self._profiler.profiler is not None
        # Kineto's own events: torch types neither the results nor what they hold.
        results: Any = self._profiler.profiler.kineto_results
        events = sorted(results.events(), key=lambda event: event.start_ns())
        held, phase = self.cost.static_bytes, "forward"
        peaks: dict[str, int] = dict.fromkeys(PHASES, held)
        calls = 0
        for event in events:
            name = event.name()
            if name.startswith("phase/"):
                phase = name.removeprefix("phase/")
                peaks[phase] = max(peaks[phase], held)
            elif name == "[memory]":
                held += event.nbytes()
                peaks[phase] = max(peaks[phase], held)
            elif name.startswith(("gloo:", "nccl:")):
                calls += event.duration_ns()
        self.cost.communication = calls / 1e9
        if stage.device.type == "cpu":
            self.cost.peak_bytes = peaks


def held_bytes(stage: LightningModule, trainer: Trainer) -> dict[str, int]:
    """Of parameters (buffers included), gradients and optimizer state on this rank."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    held = {
        "parameters": [*stage.parameters(), *stage.buffers()],
        "gradients": [p.grad for p in stage.parameters() if p.grad is not None],
        "optimizer": [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)],
    }
    return {name: sum(local(t).numel() * t.element_size() for t in tensors) for name, tensors in held.items()}


def strategy_of(name: str, *, compute: str) -> Any:
    """Lightning's or our own."""
    if name == "ddp":
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return ShardedStrategy(compute=compute) if name == "fsdp" else "auto"  # type: ignore[arg-type]


def measure(
    size: Size, *, rows: int, row_length: int, steps: int, strategy: str, compute: str, recompute: bool, gpu: bool
) -> StepCost:
    """Train for so many steps on this rank's own dialogues."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokens_of(size, Path(folder))
        tokenizer = DialogueTokenizer.from_config(tokens)
        torch.manual_seed(0)
        stage: EChatStage = EmpathyStage(
            tokens=tokens,
            network=network_of(size, recompute=recompute),
            optimizer=partial(torch.optim.AdamW, lr=1e-4, fused=True),
        )
        counting = MeasureSteps(steps)
        trainer = Trainer(
            accelerator="gpu" if gpu else "cpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            strategy=strategy_of(strategy, compute=compute),
            precision="bf16-mixed" if compute == "bfloat16" and strategy != "fsdp" else "32-true",
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=[counting],
            default_root_dir=folder,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        rank = int(os.environ.get("RANK", "0"))
        batches = [dialogues(tokenizer, rows=rows, row_length=row_length, seed=rank)] * steps
        trainer.fit(stage, train_dataloaders=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        return counting.cost


def dialogues(tokenizer: DialogueTokenizer, *, rows: int, row_length: int, seed: int) -> PackedBatch:
    """Packed rows of spoken dialogues with thinking, each filled up to its length."""
    task = task_from_name("speech_to_speech.label_thinking")
    packed, number = [], 1000 * seed
    for _ in range(rows):
        row, used = [], 0
        while (dialogue := dummy_tokenized(tokenizer, task, number=number)) and (
            used + len(dialogue.input_ids) <= row_length or not row
        ):
            row.append(dialogue)
            used += len(dialogue.input_ids)
            number += 1
        packed.append(row)
    return pack_rows(packed, padding=tokenizer.vocabulary.padding)


def table(costs: dict[int, StepCost], *, world: int, peak: float | None) -> str:
    """One line for each number of rows."""
    base = next(iter(costs.values()))
    lines = ["rows  tokens/s  (ratio)  supervised/s   data  forw.  backw.  optim.  comm.   peak GB by phase      MFU"]
    for rows, cost in costs.items():
        total, first = sum(cost.seconds.values()), sum(base.seconds.values())
        speed, ratio = world * cost.tokens / total, cost.tokens / total / (base.tokens / first)
        shares = "  ".join(f"{cost.seconds[name] / total:5.1%}" for name in ("data", *PHASES))
        peaks = " / ".join(f"{cost.peak_bytes[name] / 1e9:.2f}" for name in PHASES)
        mfu = f"{cost.flops * cost.used_share / (total * peak):.1%}" if peak else "-"
        lines.append(
            f"{rows:4d}  {speed:8.0f}  ({ratio:4.2f})  {world * cost.supervised / total:12.0f}  {shares}  "
            f"{cost.communication / total:5.1%}   {peaks}   {mfu}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="rows of a batch, one measurement each")
    parser.add_argument("--row_length", type=int, default=1024, help="ids of a row")
    parser.add_argument("--steps", type=int, default=8, help="the first two warm up, the last is profiled")
    parser.add_argument("--strategy", choices=("single", "ddp", "fsdp"), default="single")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing of encoder and LLM")
    parser.add_argument("--out", type=Path, help="JSON file for figures and settings")
    options = parser.parse_args()
    if options.steps < _WARM_UP + 2:
        parser.error(f"--steps must be at least {_WARM_UP + 2}")
    gpu = torch.cuda.is_available()
    compute = "bfloat16" if gpu else "float32"
    settings = {name: getattr(options, name) for name in ("row_length", "steps", "strategy", "recompute")}
    costs: dict[int, StepCost] = {}
    for rows in options.rows:
        try:
            costs[rows] = measure(SIZES[options.size], rows=rows, compute=compute, gpu=gpu, **settings)
        except torch.OutOfMemoryError:
            sys.stderr.write(f"{rows} rows do not fit\n")
            break
    if int(os.environ.get("RANK", "0")) or not costs:
        return
    device = torch.device("cuda" if gpu else "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    machine = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    about = {"size": options.size, "processes": world, "compute": compute, "machine": machine, **versions, **settings}
    sys.stdout.write(f"{json.dumps(about)}\n{table(costs, world=world, peak=peak_flops(device, precision='bf16'))}\n")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {str(rows): cost.__dict__ for rows, cost in costs.items()}
        options.out.write_text(json.dumps({"settings": about, "rows": figures}, indent=1))


if __name__ == "__main__":
    main()
