"""The same numbers however the network is spread."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import ModelParallelStrategy
from torch._dynamo.utils import counters

from lightning_echat.contracts import UserError
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import run_on_ranks
from tests.sharded_training import (
    Case,
    compare_with_one_process,
    sharding,
    train_and_answer,
    train_cases,
)
from tests.tiny_training import batches_of, make_stage, make_trainer, recorded, train

SOON = timedelta(seconds=1)
CASES = {
    "DDP": Case(sharding=None),
    "FSDP": Case(),
    "FSDP, a replica a rank": Case(sharding={"replicas": 2}),
    "FSDP, encoder computed again": Case(again=("encoder",)),
    "FSDP, language model computed again": Case(again=("llm",)),
    "FSDP, offloaded": Case(sharding={"cpu_offload": True}),
    "FSDP, encoder frozen": Case(trainable=("adapter.*", "lm.*")),
    "FSDP, language model frozen": Case(trainable=("encoder.*", "adapter.*"), again=("encoder", "llm")),
    "FSDP, LoRA": Case(lora=True),
    "FSDP, bfloat16": Case(sharding={"compute": "bfloat16"}, tolerance=2e-2),
}


COMPILED = {
    "DDP, compiled": Case(sharding=None, compiled=True),
    "FSDP, compiled": Case(compiled=True),
    "FSDP, compiled and computed again": Case(compiled=True, again=("encoder", "llm")),
    "TP, compiled": Case(sharding={"tensor_parallel": 2}, compiled=True),
}


def test_every_way_of_spreading_gives_the_curve_and_weights_of_one_process(tmp_path, tokens):
    """A loss that is divided by a rank's own ids, a norm of a part, a part that one rank does not reduce.

    The ranks' batches lack audio, text targets, speech targets or everything, each on one rank only: a rank that
    leaves out a collective call hangs here.
    """
    run_on_ranks(train_cases, tokens, tmp_path, CASES)
    compare_with_one_process(tokens, tmp_path, CASES, window=2)


@pytest.mark.slow
def test_replicas_of_shards_give_the_curve_of_one_process(tmp_path, tokens):
    """With four ranks both dimensions of the mesh are real."""
    cases = {
        "FSDP": Case(),
        "HSDP": Case(sharding={"replicas": 2}),
        "HSDP, computed again": Case(sharding={"replicas": 2}, again=("encoder", "llm")),
        "HSDP, LoRA": Case(sharding={"replicas": 2}, lora=True),
    }
    run_on_ranks(train_cases, tokens, tmp_path, cases, 4, ranks=4)
    compare_with_one_process(tokens, tmp_path, cases, window=1)


def train_compiled(tokens: TokensConfig, folder: Path) -> None:
    train_cases(tokens, folder, COMPILED)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.slow
def test_compiled_blocks_give_the_curve_of_plain_ones(tmp_path, tokens):
    """Also where they are sharded, and where they are computed again."""
    run_on_ranks(train_compiled, tokens, tmp_path)
    tensor = {name: case for name, case in COMPILED.items() if name.startswith("TP")}
    compare_with_one_process(tokens, tmp_path, {n: c for n, c in COMPILED.items() if n not in tensor}, window=2)
    compare_with_one_process(tokens, tmp_path, tensor, window=4)


def test_answers_and_metrics_of_a_sharded_network_are_those_of_a_whole_one(tmp_path, tokens):
    """Ranks that answer to different lengths, or have nothing to answer, and go on training as if nothing had been."""
    run_on_ranks(train_and_answer, tokens, tmp_path / "two")
    train_and_answer(tokens, tmp_path / "one", alone=True)
    one = torch.load(tmp_path / "one" / "answers0.pt")
    ranks = [torch.load(tmp_path / "two" / f"answers{rank}.pt") for rank in (0, 1)]
    assert len(one["answers"]) == 10 and not ranks[0]["answers"].keys() & ranks[1]["answers"].keys()
    assert ranks[0]["answers"] | ranks[1]["answers"] == one["answers"]
    lengths = [{len(text) + len(codes) for text, codes, _ in rank["answers"].values()} for rank in ranks]
    assert lengths[0] != lengths[1], "the ranks should have written to different lengths"
    assert "val/dialogue/accuracy/age" in one["metrics"] and "val/dialogue/empathy/mean" in one["metrics"]
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert recorded(tmp_path / "two", window=2)[0] == pytest.approx(recorded(tmp_path / "one")[0], rel=1e-5)


def train_from_other_seeds(tokens: TokensConfig, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    stage = make_stage(tokens)
    torch.manual_seed(rank)
    options: dict[str, Any] = {"strategy": sharding(replicas=2), "devices": 2}
    train(stage, micro[:2], folder, **options)


def test_replicas_begin_alike_whatever_the_seeds_of_their_ranks(tmp_path, tokens):
    """As without seed_everything: nothing would ever bring them together again."""
    run_on_ranks(train_from_other_seeds, tokens, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt")["weights"] for rank in (0, 1))
    assert len(first) > 50
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("what", ["replicas", "tensor_parallel"])
def test_groups_that_do_not_divide_the_ranks_are_refused(tmp_path, tokens, what):
    options: dict[str, Any] = {what: 3}
    trainer = make_trainer(tmp_path, strategy=ShardedStrategy(**options), devices=1)
    with pytest.raises(UserError, match=rf"strategy\.{what} is 3, which does not divide the 1 processes"):
        trainer.fit(make_stage(tokens), train_dataloaders=[])


def test_replicas_of_groups_are_refused(tmp_path, tokens):
    trainer = make_trainer(tmp_path, strategy=ShardedStrategy(replicas=2, tensor_parallel=2), devices=4)
    trainer.strategy.num_nodes = 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="do not go together"):
        trainer.strategy.setup_environment()


def test_a_group_over_nodes_is_refused(tmp_path, tokens):
    trainer = make_trainer(tmp_path, strategy=ShardedStrategy(tensor_parallel=2, timeout=SOON), devices=1, num_nodes=2)
    with pytest.raises(UserError, match="does not divide the 1 processes of a node"):
        trainer.strategy.setup_environment()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_precision_that_rounds_the_weights_is_refused(tmp_path, tokens, precision):
    trainer = make_trainer(tmp_path, strategy=ShardedStrategy(), devices=1, precision=precision)
    with pytest.raises(UserError, match=f"trainer.precision is {precision}, .* give strategy.compute: bfloat16"):
        trainer.fit(make_stage(tokens), train_dataloaders=[])


def test_gradients_kept_on_the_host_are_summed_by_what_reaches_it(monkeypatch):
    """NCCL does not. There is no GPU here: only the choice is looked at."""
    strategy = ShardedStrategy(cpu_offload=True)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy.accelerator = CUDAAccelerator()
    strategy.cluster_environment = LightningEnvironment()
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", stop)
    with pytest.raises(StopIteration):
        strategy.setup_environment()
    assert strategy.process_group_backend == "cpu:gloo,cuda:nccl"


def stop(*_: Any) -> None:
    raise StopIteration


def test_a_strategy_that_would_have_every_rank_train_by_itself_is_refused(tmp_path, tokens):
    """Lightning's own is tensor parallel by default, and would train whole networks that never meet."""
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy(1, 1), devices=1)
    with pytest.raises(UserError, match=r"use lightning_echat\.parallel\.ShardedStrategy"):
        trainer.fit(make_stage(tokens), train_dataloaders=[])
