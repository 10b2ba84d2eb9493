"""Language models cut over ranks: which are refused, and that the others train, answer and go on as one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_echat.checkpoints.consolidate import consolidate
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.nn.tensor_parallel import cut_language_model
from lightning_echat.nn.weights import load_trained
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import run_on_ranks
from tests.sharded_training import (
    Case,
    compare_with_one_process,
    same_ends,
    sharding,
    train_and_answer,
    train_cases,
    train_part,
)
from tests.tiny_training import Listed, batches_of, make_stage, make_trainer, recorded

SIZES = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
QWEN = {"model_type": "qwen2", "intermediate_size": 48, "num_key_value_heads": 2, **SIZES}
TENSOR = {"TP": Case(sharding={"tensor_parallel": 2})}
TENSOR_AND_MORE = TENSOR | {
    "TP, LoRA": Case(sharding={"tensor_parallel": 2}, lora=True),
    "TP, computed again": Case(sharding={"tensor_parallel": 2}, again=("encoder", "llm")),
    "TP, language model frozen": Case(sharding={"tensor_parallel": 2}, trainable=("encoder.*", "adapter.*")),
    "TP, offloaded": Case(sharding={"tensor_parallel": 2, "cpu_offload": True}),
    "TP, bfloat16": Case(sharding={"tensor_parallel": 2, "compute": "bfloat16"}, tolerance=2e-2),
}


def language_model(**config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        (QWEN, 3, "tensor_parallel is 3, which does not divide the language model's 4 (num_attention_heads)"),
        (QWEN, 4, "tensor_parallel is 4, which does not divide the language model's 2 (num_key_value_heads)"),
        (QWEN | {"intermediate_size": 49}, 2, "does not divide the language model's 49 (the width of layers.0.mlp"),
        ({"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 1}, 2, "GPT2LMHeadModel has no plan"),
        (QWEN | {"model_type": "qwen3", "head_dim": 6}, 2, "replicated_with_grad_allreduce for layers.*.self_attn.q_n"),
    ],
    ids=["heads", "key heads", "width", "no plan", "another plan"],
)
def test_what_cannot_be_cut_is_refused_in_one_line_and_left_whole(config, ranks, said):
    llm = language_model(**config)
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    with pytest.raises(UserError) as refused:
        cut_language_model(llm, mesh)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert all(type(parameter) is nn.Parameter for parameter in llm.parameters())


@pytest.mark.slow
def test_groups_of_ranks_that_compute_together_give_the_curve_of_one_process(tmp_path, tokens):
    """With four ranks the blocks are cut both ways, and the norm is over three kinds of meshes."""
    run_on_ranks(train_cases, tokens, tmp_path, TENSOR_AND_MORE, 4, ranks=4)
    compare_with_one_process(tokens, tmp_path, TENSOR_AND_MORE, window=2)


def compute_together(tokens: TokensConfig, folder: Path) -> None:
    train_cases(tokens, folder, TENSOR)
    train_and_answer(tokens, folder / "answers", strategy=sharding(tensor_parallel=2))


def test_ranks_that_compute_every_batch_together_train_and_answer_as_one_process(tmp_path, tokens):
    """A gradient of a part only, ids counted by each rank; a cache of a rank's heads, answers counted twice."""
    run_on_ranks(compute_together, tokens, tmp_path)
    compare_with_one_process(tokens, tmp_path, TENSOR, window=4)
    train_and_answer(tokens, tmp_path / "alone", alone=True)
    one = torch.load(tmp_path / "alone" / "answers0.pt")
    assert len(one["answers"]) == 10 and one["metrics"]["val/dialogue/empathy/count"] > 0
    for rank in (0, 1):
        there = torch.load(tmp_path / "answers" / f"answers{rank}.pt")
        assert there["answers"] == one["answers"]
        assert there["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


class DealtToRanks(Listed):
    """Every rank of a group gets batches of its own."""

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        assert self.trainer is not None
        return DataLoader(self.batches[self.trainer.global_rank :: 2], batch_size=None)  # type: ignore[arg-type]


def train_on_different_batches(tokens: TokensConfig, folder: Path) -> None:
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    trainer = make_trainer(folder, strategy=sharding(tensor_parallel=2), devices=2)
    with pytest.raises(UserError, match="read different batches"):
        trainer.fit(make_stage(tokens), datamodule=DealtToRanks(micro))


def test_ranks_that_should_compute_together_and_read_different_batches_are_stopped(tmp_path, tokens):
    """One could not read a file, say: they would train on a mixture of two batches, or hang."""
    run_on_ranks(train_on_different_batches, tokens, tmp_path)


class KeepRandomState(Callback):
    """Writes down where each rank's generator stands after a batch; it draws more on rank 1, as a GPU for more ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        torch.save(torch.get_rng_state(), self.folder / f"random{trainer.global_rank}.pt")
        if trainer.strategy.distributed_sampler_kwargs["num_replicas"] > 1:  # type: ignore[attr-defined]
            torch.rand(trainer.global_rank)


def go_on_together(tokens: TokensConfig, folder: Path) -> None:
    """After a step in which each rank had batches of its own, and dropped of them."""
    apart, together = folder / "apart", folder / "together"
    for part, strategy, ckpt_path in (
        (apart, sharding(), None),
        (together, sharding(tensor_parallel=2), apart / "checkpoints" / "epoch=0-step=1.ckpt"),
    ):
        part.mkdir(exist_ok=True)
        watching = (KeepRandomState(part),)
        train_part(tokens, part, world=2, strategy=strategy, ckpt_path=ckpt_path, callbacks=watching)


def test_ranks_that_go_on_together_drop_the_same(tmp_path, tokens):
    """Each would go on with the random numbers of its own past, and compute another half of another voice."""
    run_on_ranks(go_on_together, tokens, tmp_path)
    apart, together = ([torch.load(tmp_path / how / f"random{n}.pt") for n in (0, 1)] for how in ("apart", "together"))
    assert not torch.equal(*apart)
    assert torch.equal(*together)


def change_layouts(tokens: TokensConfig, folder: Path) -> None:
    """Save and go on; with the layers whole again; and from a checkpoint in which they were whole."""
    together = partial(sharding, tensor_parallel=2)
    train_part(tokens, folder / "tp", world=2, strategy=together())
    step_1 = folder / "tp" / "checkpoints" / "epoch=0-step=1.ckpt"
    train_part(tokens, folder / "tp to tp", world=2, strategy=together(), ckpt_path=step_1)
    train_part(tokens, folder / "tp to fsdp", world=2, strategy=sharding(), ckpt_path=step_1)
    train_part(tokens, folder / "fsdp", world=2, strategy=sharding())
    step_1 = folder / "fsdp" / "checkpoints" / "epoch=0-step=1.ckpt"
    train_part(tokens, folder / "fsdp to tp", world=2, strategy=together(), ckpt_path=step_1)


@pytest.mark.slow
def test_a_run_of_ranks_that_compute_together_goes_on_in_any_layout(tmp_path, tokens):
    """A part that is stored for the whole, an optimizer's moments under another part's name."""
    run_on_ranks(change_layouts, tokens, tmp_path)
    same_ends(tmp_path / "tp", tmp_path / "tp to tp", tolerance=0.0, windows=(4, 4))
    same_ends(tmp_path / "tp", tmp_path / "tp to fsdp", tolerance=1e-5, windows=(4, 2))
    same_ends(tmp_path / "fsdp", tmp_path / "fsdp to tp", tolerance=1e-5, windows=(2, 4))
    trained = load_trained(tmp_path / "tp")
    _, weights = recorded(tmp_path / "tp", window=4)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name
    consolidate(tmp_path / "tp" / "checkpoints" / "epoch=0-step=1.ckpt", tmp_path / "whole.ckpt")
    train_part(tokens, tmp_path / "one", world=1, strategy=None, ckpt_path=tmp_path / "whole.ckpt")
    same_ends(tmp_path / "tp", tmp_path / "one", tolerance=1e-5, windows=(4, 1))
