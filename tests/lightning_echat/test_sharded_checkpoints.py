"""Checkpoints that every rank writes its part of: a run goes on from them, and commands read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.stage_checkpoint import StageCheckpoint
from lightning_echat import parallel
from lightning_echat.checkpoints.consolidate import consolidate
from lightning_echat.contracts import UserError
from lightning_echat.nn.sharded_files import is_sharded, read_sharded
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.nn.weights import latest_checkpoint, load_trained
from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import run_on_ranks
from tests.sharded_training import (
    ADAM,
    names,
    same_ends,
    sharding,
    train_part,
)
from tests.tiny_training import batches_of, make_stage, recorded, train


def train_sharded(tokens: TokensConfig, folder: Path, world: int, ckpt_path: Path | None = None) -> None:
    train_part(tokens, folder, world=world, strategy=sharding(), ckpt_path=ckpt_path)


def save_and_go_on(tokens: TokensConfig, folder: Path) -> None:
    train_sharded(tokens, folder / "two", 2)
    train_sharded(tokens, folder / "two to two", 2, folder / "two" / "checkpoints" / "epoch=0-step=1.ckpt")
    hand_over(tokens, folder / "two")


def hand_over(tokens: TokensConfig, folder: Path) -> None:
    """The next stage adds LoRA, and is sharded itself."""
    network = tiny_network_config(lora=LoRAConfig(rank=4, dropout=0.0), auxiliary_labels=("age", "emotion"))
    stage = make_stage(tokens, network=network, init_from=str(folder), init_new_parts=["*.lora_*"])
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    train(stage, micro[:2], folder / "lora", strategy=sharding(), devices=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory, tokens: TokensConfig) -> Path:
    """A folder with what `save_and_go_on` leaves."""
    folder = tmp_path_factory.mktemp("sharded")
    run_on_ranks(save_and_go_on, tokens, folder)
    return folder


def test_a_sharded_run_goes_on_to_the_bit(two):
    """Optimizer state that is lost, or a window that begins with ids of another."""
    same_ends(two / "two", two / "two to two", tolerance=0.0)


def test_a_run_goes_on_with_fewer_ranks_and_from_one_file_without_any(tmp_path, two, tokens, capsys):
    """Sharded on one rank; and as a single file on a single process that knows nothing of sharding."""
    step_1 = two / "two" / "checkpoints" / "epoch=0-step=1.ckpt"
    run_on_ranks(train_sharded, tokens, tmp_path / "sharded", 1, step_1, ranks=1)
    same_ends(two / "two", tmp_path / "sharded", tolerance=1e-5, windows=(2, 4))
    consolidate(step_1, tmp_path / "whole.ckpt")
    assert "weights of step 1" in capsys.readouterr().out
    train_part(tokens, tmp_path / "one", world=1, strategy=None, ckpt_path=tmp_path / "whole.ckpt")
    same_ends(two / "two", tmp_path / "one", tolerance=1e-5, windows=(2, 1))


@pytest.mark.slow
def test_a_run_goes_on_with_more_ranks(tmp_path, two, tokens):
    step_1 = two / "two" / "checkpoints" / "epoch=0-step=1.ckpt"
    run_on_ranks(train_sharded, tokens, tmp_path / "four", 4, step_1, ranks=4)
    same_ends(two / "two", tmp_path / "four", tolerance=1e-5, windows=(2, 1))
    run_on_ranks(train_sharded, tokens, tmp_path / "one", 1, ranks=1)
    step_1 = tmp_path / "one" / "checkpoints" / "epoch=0-step=1.ckpt"
    run_on_ranks(train_sharded, tokens, tmp_path / "one to two", 2, step_1)
    same_ends(tmp_path / "one", tmp_path / "one to two", tolerance=1e-5, windows=(4, 2))


def test_commands_read_a_sharded_checkpoint_as_they_read_a_file(two, tokens, tokenizer):
    trained = load_trained(two / "two")
    _, weights = recorded(two / "two", window=2)
    assert trained.step == 2 and trained.path.is_dir()
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name


def test_a_stage_starts_from_a_sharded_one_also_where_it_adds_parts(two):
    """The weights under LoRA keep what the stage before has learned; only new parts move."""
    _, before = recorded(two / "two", window=2)
    _, after = recorded(two / "two" / "lora")
    frozen = {name: name.replace("base_model.model.", "").replace(".base_layer", "") for name in after}
    frozen = {new: old for new, old in frozen.items() if "lm.llm." in new and ".lora_" not in new}
    assert len(frozen) > 10
    for new, old in frozen.items():
        assert torch.equal(after[new], before[old]), new


def test_what_is_not_whole_is_passed_over_and_what_is_broken_is_named(tmp_path, two):
    """A folder whose saving was cut short, a link to what is gone, a shard that is missing."""
    run = tmp_path / "checkpoints"
    run.mkdir()
    source = two / "two" / "checkpoints" / "epoch=0-step=1.ckpt"
    whole = run / "epoch=0-step=1.ckpt"
    whole.mkdir()
    for file in source.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    (run / ".epoch=0-step=2.ckpt.partial").mkdir()
    (run / "epoch=0-step=3.ckpt").mkdir()
    (run / "last.ckpt").symlink_to("epoch=0-step=2.ckpt")
    assert latest_checkpoint(tmp_path) == whole
    (whole / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"lacks __1_0\.distcp"):
        load_trained(tmp_path)


def go_on_from_what_one_rank_cannot_see(tokens: TokensConfig, folder: Path, ckpt_path: Path) -> None:
    if os.environ["RANK"] == "1":
        parallel.check_sharded = not_there
    with pytest.raises(UserError, match=r"cannot load checkpoint .*rank 1: no folder there"):
        train_sharded(tokens, folder, 2, ckpt_path)


def not_there(path: Path) -> None:
    raise UserError("no folder there")


def test_a_checkpoint_that_one_rank_cannot_see_ends_all_with_the_same_line(tmp_path, two, tokens):
    """As where a node has not mounted it: the others would begin to read, and wait for that rank."""
    step_1 = two / "two" / "checkpoints" / "epoch=0-step=1.ckpt"
    run_on_ranks(go_on_from_what_one_rank_cannot_see, tokens, tmp_path, step_1)


def test_an_index_that_would_run_something_is_refused(tmp_path):
    """The index is a pickle."""
    folder = tmp_path / "a.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    torch.save({}, folder / "meta.pt")
    with pytest.raises(UserError, match=r"names posix\.system"):
        load_trained(folder)


class LookAtTheLast(Callback):
    """Rank 0 looks at what stands under the names of checkpoints while the next one is being written."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step:
            folder = Path(str(trainer.checkpoint_callback.dirpath))  # type: ignore[union-attr]
            for path in folder.glob("*.ckpt"):
                assert is_sharded(path), f"{path} has its name and is not whole"


def save_in_the_background(tokens: TokensConfig, folder: Path) -> None:
    """The same run as that of the fixture `two`, but for how it saves; it keeps the newest checkpoint only."""
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    keeping = StageCheckpoint(dirpath=folder / "checkpoints", save_last="link", save_top_k=1, every_n_train_steps=1)
    spread: dict[str, Any] = {"devices": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    train(
        make_stage(tokens, optimizer=ADAM),
        micro,
        folder,
        keeping,
        LookAtTheLast(),
        strategy=sharding(async_saving=True),
        **spread,
    )


def test_what_is_saved_in_the_background_is_what_there_was_at_that_step(tmp_path, two, tokens):
    """A copy that training goes on to change; a checkpoint deleted before that which replaces it is whole."""
    run_on_ranks(save_in_the_background, tokens, tmp_path)
    assert names(tmp_path) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    there = read_sharded(tmp_path / "checkpoints" / "last.ckpt", optimizer=True)
    expected = read_sharded(two / "two" / "checkpoints" / "epoch=0-step=2.ckpt", optimizer=True)
    assert there["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(there["state_dict"][name], tensor), name
    (own,), (other,) = (whole["optimizer_states"] for whole in (there, expected))
    for name, entry in other["state"].items():
        assert torch.equal(own["state"][name]["exp_avg"], entry["exp_avg"]), name
