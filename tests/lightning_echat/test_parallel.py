"""The same numbers however the network is spread, and no rank that waits for another for ever."""

from __future__ import annotations

import errno
import os
import resource
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.checkpoint import filesystem
from torch.utils.data import DataLoader

from callbacks.empathy_evaluation import EmpathyEvaluation
from callbacks.paralinguistic_accuracy import ParalinguisticAccuracy
from callbacks.stage_checkpoint import StageCheckpoint
from lightning_echat.checkpoints.consolidate import consolidate
from lightning_echat.command_errors import explain_lost_rank
from lightning_echat.contracts import PackedBatch, UserError
from lightning_echat.decoding import DecodingConfig
from lightning_echat.nn.echat_model import NetworkConfig
from lightning_echat.nn.sharded_files import is_sharded, read_sharded
from lightning_echat.nn.speech_language_model import LoRAConfig
from lightning_echat.nn.weights import latest_checkpoint, load_trained
from lightning_echat.parallel import ShardedStrategy
from lightning_echat.stages.base import EChatStage
from lightning_echat.testing import dummy_batch, tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name
from tests.ranks import run_on_ranks, statuses_of_ranks
from tests.tiny_training import Listed, batches_of, make_stage, make_trainer, recorded, train

ADAM = partial(torch.optim.AdamW, lr=0.01)
LIMIT = timedelta(seconds=180)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training: how it is spread, and what of the network trains.

    Attributes:
        sharding: Options of `ShardedStrategy`; None for DDP.
        again: Parts whose layers are computed again in backward.
        lora: Whether the language model is adapted by LoRA.
        compiled: Whether blocks are compiled.
        trainable: Patterns of what trains.
        tolerance: Of the curve and of the weights.
    """

    sharding: dict[str, Any] | None = field(default_factory=dict)
    again: tuple[str, ...] = ()
    lora: bool = False
    compiled: bool = False
    trainable: tuple[str, ...] = ("*",)
    tolerance: float = 1e-5

    def network(self) -> NetworkConfig:
        lora = LoRAConfig(rank=4, dropout=0.0) if self.lora else None
        config = tiny_network_config(auxiliary_labels=("age", "emotion"), lora=lora)
        again = {part: replace(getattr(config, part), gradient_checkpointing=True) for part in self.again}
        return replace(config, **again)

    def train(self, tokens: TokensConfig, folder: Path, *, alone: bool = False, world: int = 2) -> None:
        micro, whole = batches_of(DialogueTokenizer.from_config(tokens))
        stage = make_stage(tokens, network=self.network(), trainable=list(self.trainable), compile_blocks=self.compiled)
        options: dict[str, Any] = {"gradient_clip_val": 0.5}
        if not alone:
            strategy = DDPStrategy(timeout=LIMIT) if self.sharding is None else sharding(**self.sharding)
            groups = world // (self.sharding or {}).get("tensor_parallel", 1)
            options |= {"strategy": strategy, "devices": world, "accumulate_grad_batches": 4 // groups}
        train(stage, whole if alone else micro, folder, **options)


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
TENSOR = {"TP": Case(sharding={"tensor_parallel": 2})}
TENSOR_AND_MORE = TENSOR | {
    "TP, LoRA": Case(sharding={"tensor_parallel": 2}, lora=True),
    "TP, computed again": Case(sharding={"tensor_parallel": 2}, again=("encoder", "llm")),
    "TP, language model frozen": Case(sharding={"tensor_parallel": 2}, trainable=("encoder.*", "adapter.*")),
    "TP, offloaded": Case(sharding={"tensor_parallel": 2, "cpu_offload": True}),
    "TP, bfloat16": Case(sharding={"tensor_parallel": 2, "compute": "bfloat16"}, tolerance=2e-2),
}
COMPILED = {
    "DDP, compiled": Case(sharding=None, compiled=True),
    "FSDP, compiled": Case(compiled=True),
    "FSDP, compiled and computed again": Case(compiled=True, again=("encoder", "llm")),
    "TP, compiled": Case(sharding={"tensor_parallel": 2}, compiled=True),
}


def sharding(**options: Any) -> ShardedStrategy:
    return ShardedStrategy(timeout=LIMIT, **options)


def train_cases(tokens: TokensConfig, folder: Path, cases: dict[str, Case], world: int = 2) -> None:
    for name, case in cases.items():
        case.train(tokens, folder / name, world=world)


def test_every_way_of_spreading_gives_the_curve_and_weights_of_one_process(tmp_path, tokens):
    """A loss that is divided by a rank's own ids, a norm of a part, a part that one rank does not reduce.

    The ranks' batches lack audio, text targets, speech targets or everything, each on one rank only: a rank that
    leaves out a collective call hangs here.
    """
    run_on_ranks(train_cases, tokens, tmp_path, CASES)
    _compare_with_one_process(tokens, tmp_path, CASES, window=2)


@pytest.mark.slow
def test_groups_of_ranks_that_compute_together_give_the_curve_of_one_process(tmp_path, tokens):
    """With four ranks the blocks are cut both ways, and the norm is over three kinds of meshes."""
    run_on_ranks(train_cases, tokens, tmp_path, TENSOR_AND_MORE, 4, ranks=4)
    _compare_with_one_process(tokens, tmp_path, TENSOR_AND_MORE, window=2)


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
    _compare_with_one_process(tokens, tmp_path, cases, window=1)


def train_compiled(tokens: TokensConfig, folder: Path) -> None:
    train_cases(tokens, folder, COMPILED)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


@pytest.mark.slow
def test_compiled_blocks_give_the_curve_of_plain_ones(tmp_path, tokens):
    """Also where they are sharded, and where they are computed again."""
    run_on_ranks(train_compiled, tokens, tmp_path)
    tensor = {name: case for name, case in COMPILED.items() if name.startswith("TP")}
    _compare_with_one_process(tokens, tmp_path, {n: c for n, c in COMPILED.items() if n not in tensor}, window=2)
    _compare_with_one_process(tokens, tmp_path, tensor, window=4)


def _compare_with_one_process(tokens: TokensConfig, folder: Path, cases: dict[str, Case], *, window: int) -> None:
    ones: dict[Any, tuple[list[float], dict[str, Tensor]]] = {}
    for name, case in cases.items():
        alike = (case.lora, case.trainable)
        if alike not in ones:
            one = folder / f"one, as {name}"
            replace(case, again=(), compiled=False).train(tokens, one, alone=True)
            ones[alike] = recorded(one)
        curve, weights = ones[alike]
        spread, ends = recorded(folder / name, window=window)
        assert spread == pytest.approx(curve, rel=case.tolerance), name
        assert ends.keys() == weights.keys()
        for key, tensor in weights.items():
            close = {"atol": case.tolerance, "rtol": case.tolerance, "msg": lambda m, n=f"{name}: {key}": f"{n}: {m}"}
            torch.testing.assert_close(ends[key], tensor, **close)


class KeepAnswers(Callback):
    """Each rank writes down what its model answers in validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Any] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, EChatStage)
        for reply in pl_module.answers(batch):
            key = f"{trainer.global_step} {reply.reference.key}"
            self.answers[key] = (reply.text_ids, reply.speech_codes.tolist(), reply.finished)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.folder.mkdir(exist_ok=True, parents=True)
        torch.save({"answers": self.answers, "metrics": metrics}, self.folder / f"answers{trainer.global_rank}.pt")


def train_and_answer(
    tokens: TokensConfig, folder: Path, *, alone: bool = False, strategy: ShardedStrategy | None = None
) -> None:
    tokenizer = DialogueTokenizer.from_config(tokens)
    micro, whole = batches_of(tokenizer)
    spoken, written = task_from_name("text_to_speech"), task_from_name("speech_to_text.label_thinking")
    heard = task_from_name("transcribe_and_label", labels=("age",))
    # Rank 0 writes long text and then speech; rank 1 speech, and then it has nothing to answer.
    tasks = [[written, heard], [spoken], [spoken, written], []]
    validation = [dummy_batch(tokenizer, each, first=10 * n) for n, each in enumerate(tasks)]
    decoding = DecodingConfig(max_text_ids=20, max_speech_ids=12)
    strategy = strategy or sharding()
    window = 2 * strategy.tensor_parallel
    spread: dict[str, Any] = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": window}
    train(
        make_stage(tokens, decoding=decoding),
        whole if alone else micro,
        folder,
        ParalinguisticAccuracy(),
        EmpathyEvaluation(),
        KeepAnswers(folder),
        validation=validation,
        val_check_interval=1 if alone else window,
        check_val_every_n_epoch=None,
        **({} if alone else spread),
    )


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


def compute_together(tokens: TokensConfig, folder: Path) -> None:
    train_cases(tokens, folder, TENSOR)
    train_and_answer(tokens, folder / "answers", strategy=sharding(tensor_parallel=2))


def test_ranks_that_compute_every_batch_together_train_and_answer_as_one_process(tmp_path, tokens):
    """A gradient of a part only, ids counted by each rank; a cache of a rank's heads, answers counted twice."""
    run_on_ranks(compute_together, tokens, tmp_path)
    _compare_with_one_process(tokens, tmp_path, TENSOR, window=4)
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


def saving(folder: Path) -> StageCheckpoint:
    return StageCheckpoint(dirpath=folder, save_last="link", save_top_k=-1, every_n_train_steps=1)


def train_part(
    tokens: TokensConfig, folder: Path, *, world: int, strategy: ShardedStrategy | None, ckpt_path: Path | None = None
) -> None:
    """Two steps with saving, or the second of them from a checkpoint of the first."""
    micro, whole = batches_of(DialogueTokenizer.from_config(tokens))
    accumulate = 4 * strategy.tensor_parallel // world if strategy else 1
    spread: dict[str, Any] = {"strategy": strategy, "devices": world} if strategy else {"devices": 1}
    train(
        make_stage(tokens, optimizer=ADAM),
        micro if strategy else whole,
        folder,
        *([] if ckpt_path else [saving(folder / "checkpoints")]),
        first=accumulate if ckpt_path else 0,
        ckpt_path=ckpt_path,
        max_steps=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=ckpt_path is None,
        **spread,
    )


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


def same_ends(first: Path, second: Path, *, tolerance: float, windows: tuple[int, int] = (2, 2)) -> None:
    (curve, weights), (other, others) = (recorded(f, window=w) for f, w in zip((first, second), windows, strict=True))
    assert other[-1] == pytest.approx(curve[-1], rel=max(tolerance, 1e-12))
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, atol=tolerance, rtol=tolerance)


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


class KillMe(Callback):
    """Kills one rank in the middle of its second step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class StopMe(Callback):
    """Sends one rank the signal that takes a job away, in its first step."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == 0 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class FullDisk(Callback):
    """From the second step on, writing of shards fails on one rank.

    Args:
        how: The kernel's limit of a file's size, which torch's own writer runs into; or the error of a full disk.
    """

    def __init__(self, how: Literal["limit", "error"]) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != 2 or trainer.global_rank != 1:
            return
        if self.how == "limit":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        else:
            patched: Any = filesystem
            patched._write_item = no_space


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train_disturbed(
    tokens: TokensConfig, folder: Path, disturbance: Callback, limit: timedelta, async_saving: bool = False
) -> None:
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    rank = os.environ["RANK"]
    trainer = make_trainer(
        folder,
        disturbance,
        saving(folder / "checkpoints"),
        enable_checkpointing=True,
        strategy=ShardedStrategy(timeout=limit, async_saving=async_saving),
        devices=2,
    )
    try:
        trainer.fit(make_stage(tokens), datamodule=Listed(micro))
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else explain_lost_rank(error, rank=int(rank))
        (folder / f"said{rank}").write_text(str(line), encoding="utf-8")
        raise SystemExit(3) from error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_rank_that_is_killed_ends_the_others_with_a_line(tmp_path, tokens):
    """Not after the half hour that is torch's default."""
    statuses = statuses_of_ranks(train_disturbed, tokens, tmp_path, KillMe(), timedelta(seconds=60), within=240)
    assert statuses == [3, -signal.SIGKILL]
    said = (tmp_path / "said0").read_text()
    assert said.startswith("rank 0 was left alone") and "all_reduce" in said, said
    assert latest_checkpoint(tmp_path).name == "last.ckpt"


def test_a_job_that_is_asked_to_stop_saves_first(tmp_path, tokens):
    """One rank is told; all finish the step, save together and leave with 143."""
    assert statuses_of_ranks(train_disturbed, tokens, tmp_path, StopMe(), LIMIT, within=240) == [143, 143]
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "last.ckpt"]


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])
@pytest.mark.parametrize(("how", "said"), [("limit", "File too large"), ("error", "No space left on device")])
def test_a_full_disk_on_one_rank_ends_all_and_leaves_what_was_saved(tmp_path, tokens, background, how, said):
    """A rank that fails to write alone would leave the others waiting, or its half checkpoint in place of a whole."""
    disk = FullDisk(how)
    assert statuses_of_ranks(train_disturbed, tokens, tmp_path, disk, LIMIT, background, within=240) == [3, 3]
    for rank in (0, 1):
        line = (tmp_path / f"said{rank}").read_text()
        assert line.startswith("cannot save checkpoint") and "rank 1: " in line and said in line, line
    assert names(tmp_path) == ["epoch=0-step=1.ckpt", "last.ckpt"]
    assert load_trained(tmp_path).step == 1


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


def test_a_strategy_that_would_have_every_rank_train_by_itself_is_refused(tmp_path, tokens):
    """Lightning's own is tensor parallel by default, and would train whole networks that never meet."""
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy(1, 1), devices=1)
    with pytest.raises(UserError, match=r"use lightning_echat\.parallel\.ShardedStrategy"):
        trainer.fit(make_stage(tokens), train_dataloaders=[])
