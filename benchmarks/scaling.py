"""Memory per GPU and traffic per step on many GPUs, on paper; and the paper checked against runs on this machine.

    python -m benchmarks.scaling            the tables of docs/scaling.md
    python -m benchmarks.scaling --check    predicted and measured bytes of a small network, on one and two processes

The wrapping plan is the one of training (`lightning_echat.parallel.blocks`). What a block keeps for backward is not a
formula: the block is run once and what autograd saves is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import SIZES, Size, network_of, tokens_of
from benchmarks.train_step import measure
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.parallel import blocks, language_blocks
from lightning_echat.tokens.dialogue_template import DialogueTokenizer

_PROBE = 64
_CHUNK = 1024
FRAMES_PER_ID = 4.0
"""Encoder frames for each adapter output: the strides of the adapter."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the reckoning needs of a network in which everything trains.

    Attributes:
        blocks: Parameters of each unit that is gathered by itself.
        root: Parameters of what is gathered once a step: embeddings, heads, norms, convolutions.
        kept: Bytes a position that a layer of encoder, adapter and language model keeps for backward.
        inputs: Bytes a position of each one's input, all that is kept where layers are computed again.
        layers: Of each.
        vocabulary: Classes of both heads.
    """

    blocks: list[int]
    root: int
    kept: tuple[float, float, float]
    inputs: tuple[float, float, float]
    layers: tuple[int, int, int]
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(self.blocks) + self.root


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a GPU is given in a micro-batch.

    Attributes:
        positions: Ids, padding included.
        heard: Share of them that are adapter outputs.
        recompute: Whether encoder and language model compute their layers again.
    """

    positions: int = 8192
    heard: float = 0.2
    recompute: bool = True


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Over how many GPUs.

    Attributes:
        name: As in the table.
        shards: GPUs that share a copy of the model.
        replicas: Copies.
        whole: DDP: every GPU holds everything.
    """

    name: str
    shards: int
    replicas: int
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a GPU: what stays between steps, and what a step adds at its fullest."""

    static: float
    gathered: float
    gradients: float
    activations: float
    head: float

    @property
    def peak(self) -> float:
        """In backward, where it begins: activations are whole, and the first gradients are there."""
        return self.static + self.gathered + self.gradients + self.activations + self.head


def network(size: Size, *, compute: torch.dtype) -> Network:
    """Sizes of the network, built without memory."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokens_of(size, Path(folder))
        vocabulary = DialogueTokenizer.from_config(tokens).vocabulary
        with torch.device("meta"):
            model = EChatModel(network_of(size, recompute=False), tokens=tokens, vocabulary=vocabulary)
    units = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    layers = (model.encoder.layers[0], model.adapter.layers[0], language_blocks(model)[0])
    widths = (size.encoder[0], size.encoder[0], size.llm["hidden_size"])
    head_width = size.llm["hidden_size"] // size.llm["num_attention_heads"]
    turn = torch.zeros(1, _PROBE, head_width, dtype=compute)
    calls: list[Callable[[nn.Module, Tensor], object]] = [
        lambda layer, hidden: layer(hidden, torch.ones(1, 1, 1, _PROBE, dtype=torch.bool)),
        lambda layer, hidden: layer(hidden, src_key_padding_mask=torch.zeros(1, _PROBE, dtype=torch.bool)),
        lambda layer, hidden: layer(hidden, position_embeddings=(turn, turn), attention_mask=None),
    ]
    kept = [
        saved_bytes(layer.to_empty(device="cpu").to(compute).train(), call, width=width, compute=compute) / _PROBE
        for layer, call, width in zip(layers, calls, widths, strict=True)
    ]
    return Network(
        blocks=units,
        root=sum(p.numel() for p in model.parameters()) - sum(units),
        kept=(kept[0], kept[1], kept[2]),
        inputs=(widths[0] * compute.itemsize, widths[1] * compute.itemsize, widths[2] * compute.itemsize),
        layers=(size.encoder[1], size.adapter[0], size.llm["num_hidden_layers"]),
        vocabulary=size.llm["vocab_size"] + size.codebook_size + 1,
    )


def saved_bytes(
    layer: nn.Module, call: Callable[[nn.Module, Tensor], object], *, width: int, compute: torch.dtype
) -> int:
    """What autograd keeps of one call, its parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = torch.zeros(1, _PROBE, width, dtype=compute, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Alive until counted: a freed address could be given out again.
        alive = call(layer, hidden)
    del alive
    return sum(kept.values())


def memory(net: Network, load: Load, spread: Spread, *, compute: torch.dtype) -> Memory:
    """Bytes on each GPU. Weights, sums of gradients and Adam's two moments are float32."""
    size, share = compute.itemsize, 1 if spread.whole else spread.shards
    heard = load.positions * load.heard
    positions = (heard * FRAMES_PER_ID, heard, load.positions)
    activations = 0.0
    for count, layers, kept, given, again in zip(
        positions, net.layers, net.kept, net.inputs, (load.recompute, False, load.recompute), strict=True
    ):
        activations += count * layers * (given if again else kept)
    if load.recompute:
        activations += max(count * kept for count, kept in zip(positions, net.kept, strict=True))
    # One block computes while the next is gathered; of the root's gradient nothing is given away before the end.
    gathered = size * (net.root + 2 * max(net.blocks))
    if spread.whole:
        # Autocast keeps a copy of every weight that it has cast.
        gathered = 0.0 if size == 4 else size * float(net.parameters)
    gradients = 0.0 if spread.whole else size * (net.root + max(net.blocks)) + 4.0 * max(net.blocks)
    return Memory(
        static=16.0 * net.parameters / share,
        gathered=gathered,
        gradients=gradients,
        activations=activations,
        # Logits, their float32 copy, the exponentials and both gradients of a chunk.
        head=(2 * size + 12.0) * min(_CHUNK, load.positions) * net.vocabulary,
    )


def traffic(net: Network, spread: Spread, *, compute: torch.dtype, node: int = 8) -> tuple[float, float]:
    """Bytes that a GPU receives in a micro-batch, within its node and from other nodes."""
    ring = (spread.shards - 1) / spread.shards
    # Blocks are gathered in forward and again in backward; gradients are summed in float32.
    sharding = ring * (compute.itemsize * (2 * sum(net.blocks) + net.root) + 4 * net.parameters)
    between = 2 * (spread.replicas - 1) / spread.replicas * 4 * net.parameters / spread.shards
    if spread.whole:
        return (between, 0.0) if spread.replicas <= node else (0.0, between)
    return (sharding, between) if spread.shards <= node else (0.0, sharding + between)


def paper() -> str:
    """The tables, in Markdown."""
    load, compute = Load(), torch.bfloat16
    lines = []
    for name in ("3b", "7b"):
        net = network(SIZES[name], compute=compute)
        lines += [
            f"**{name}**: {net.parameters / 1e9:.2f} B parameters, {net.root / 1e9:.2f} B of them in the root's unit",
            "",
            "| GPUs | strategy | static | gathered | gradients | activations | head | peak GB | in node | between GB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for gpus in (8, 64, 512):
            spreads = [Spread(name="DDP", shards=1, replicas=gpus, whole=True)]
            if gpus > 8:
                spreads.append(Spread(name="HSDP", shards=8, replicas=gpus // 8))
            spreads.append(Spread(name="FSDP", shards=gpus, replicas=1))
            for spread in spreads:
                need = memory(net, load, spread, compute=compute)
                parts = (need.static, need.gathered, need.gradients, need.activations, need.head, need.peak)
                figures = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, *traffic(net, spread, compute=compute)))
                lines.append(f"| {gpus} | {spread.name} | {figures} |")
        lines.append("")
    return "\n".join(lines)


PARTS = ("parameters", "gradients", "optimizer", "step")


def check(row_length: int) -> str:
    """Predicted and measured megabytes of each part, one line a case."""
    lines = [f"{'MB: predicted, measured, ratio':28}" + "".join(f"{part:>26}" for part in PARTS)]
    for processes, strategy, recompute in (
        (1, "single", False),
        (1, "single", True),
        (2, "fsdp", False),
        (2, "fsdp", True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "measured.json"
            words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            words += ["-m", "benchmarks.scaling", "--measure", str(out), "--strategy", strategy]
            words += ["--row_length", str(row_length), *(["--recompute"] if recompute else [])]
            run = subprocess.run(words, capture_output=True, text=True, check=False)
            if run.returncode:
                raise SystemExit(f"{' '.join(words)} failed:\n{run.stderr[-2000:]}")
            measured = json.loads(out.read_text())
        net = network(SIZES["small"], compute=torch.float32)
        load = Load(positions=measured["positions"], heard=measured["heard"], recompute=recompute)
        spread = Spread(name=strategy, shards=processes, replicas=1, whole=strategy == "single")
        need = memory(net, load, spread, compute=torch.float32)
        quarter = need.static / 4
        # Gradients come as activations go, so a step's fullest moment does not hold all of them.
        predicted = (quarter, quarter, 2 * quarter, need.peak - need.static)
        pairs = zip(predicted, (measured[part] for part in PARTS), strict=True)
        shown = "".join(f"{p / 1e6:12.1f} {m / 1e6:8.1f} {m / p:4.2f}" for p, m in pairs)
        lines.append(f"{f'{processes} x {strategy}':12} {'recomputed' if recompute else 'kept':15}{shown}")
    return "\n".join(lines)


def _measure(out: Path, *, strategy: str, recompute: bool, row_length: int) -> None:
    """On this rank, for `check`."""
    plan = {"rows": 1, "row_length": row_length, "steps": 4, "strategy": strategy, "recompute": recompute}
    cost = measure(SIZES["small"], compute="float32", gpu=False, **plan)
    if int(os.environ.get("RANK", "0")) == 0:
        heard = cost.frames / FRAMES_PER_ID / cost.positions
        step = max(cost.peak_bytes.values()) - cost.static_bytes
        out.write_text(json.dumps({**cost.held_bytes, "step": step, "positions": cost.positions, "heard": heard}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure a small network on this machine's CPU")
    parser.add_argument("--row_length", type=int, default=512, help="ids of the row that is measured")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--strategy", default="single", help=argparse.SUPPRESS)
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        plan = {"strategy": options.strategy, "recompute": options.recompute, "row_length": options.row_length}
        _measure(options.measure, **plan)
        return
    sys.stdout.write(f"{check(options.row_length) if options.check else paper()}\n")


if __name__ == "__main__":
    main()
