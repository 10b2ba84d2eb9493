"""experiments/trainer/tp.yaml on the command line: base.yaml, a stage, the overlay, shards on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from datamodules.spoken_dialogue import SpokenDialogueDataModule
from lightning_echat import cli
from lightning_echat.contracts import PackedBatch
from lightning_echat.nn.weights import load_trained
from lightning_echat.testing import tiny_network_config, tiny_tokens_config, write_dummy_shards
from tests.ranks import run_on_ranks
from tests.tiny_training import recorded

ROOT = Path(__file__).parents[2]
STEPS = 4
TASKS = [
    {"kind": "speech_to_speech", "thinking": "label"},
    {"kind": "transcribe_and_label", "labels": ["age"]},
    {"kind": "text_to_text"},
]


class BothShares(SpokenDialogueDataModule):
    """On one process what two ranks read: in turn a batch of the first's and one of the second's."""

    _of = 0

    def train_dataloader(self) -> Any:
        loaders = []
        for self._of in (0, 1):
            loaders.append(super().train_dataloader())
        return _InTurn(loaders)

    def share(self) -> dict[str, int]:
        return {"rank": self._of, "world_size": 2}

    def val_dataloader(self) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        """It is not gone on with."""
        return {}


class _InTurn(Iterable[PackedBatch]):
    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[PackedBatch]:
        return chain.from_iterable(zip(*self.loaders, strict=True))


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a stage of full size a tiny one on CPUs; it comes after the overlay of the trainer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokens = tiny_tokens_config(folder / "tokenizer")
    write_dummy_shards(folder / "data", shards=4, samples_per_shard=6)
    source: dict[str, Any] = {"shards": ["data/*.tar"]}
    data = {
        "root": str(folder),
        "train": [{**source, "name": "dialogue", "tasks": TASKS}],
        "validation": {task["kind"]: {**source, "tasks": [task]} for task in TASKS[:2]},
        "num_workers": 1,
        "batching": {"tokens_per_batch": 400, "max_ids": 300, "pool": 6, "shuffle": 4, "validation_rows": 8},
    }
    network = asdict(tiny_network_config())
    network["adapter"]["dropout"] = 0.1
    stage = {
        "tokens": asdict(tokens),
        "network": network,
        "decoding": {"max_text_ids": 6, "max_speech_ids": 6},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "scheduler": None,
    }
    trainer = {"accelerator": "cpu", "log_every_n_steps": 1, "max_steps": STEPS, "enable_progress_bar": False}
    file = folder / "tiny.yaml"
    # Through JSON's types: tuples have no plain YAML.
    content = {"trainer": trainer, "model": {"init_args": stage}, "data": {"init_args": data}}
    file.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    return file


def fit(overlay: Path, folder: Path, *more: str, trainer: str, devices: int = 1, window: int = 1) -> list[str]:
    """The words of a documented command with the tiny overlay; it records below `folder`."""
    files = ["base.yaml", "empathy.yaml", f"trainer/{trainer}.yaml"]
    record = folder.with_name(f"{folder.name}.yaml")
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    watching = [
        {"class_path": "callbacks.stage_checkpoint.StageCheckpoint", "init_args": {"save_last": "link"}},
        {"class_path": "callbacks.paralinguistic_accuracy.ParalinguisticAccuracy"},
        {"class_path": "callbacks.empathy_evaluation.EmpathyEvaluation"},
        {"class_path": "callbacks.data_health.DataHealth"},
        {"class_path": "tests.tiny_training.Record", "init_args": {"folder": str(folder)}},
    ]
    settings: dict[str, Any] = {"default_root_dir": str(folder), "devices": devices, "val_check_interval": 2 * window}
    settings |= {"accumulate_grad_batches": window, "logger": [logger], "callbacks": watching}
    if trainer != "cpu":
        settings["strategy"] = {"init_args": {"compute": "float32", "timeout": "0:05:00"}}
    record.write_text(yaml.safe_dump({"trainer": settings}))
    configs = [*(str(ROOT / "experiments" / name) for name in files), str(overlay), str(record)]
    return ["fit", *chain.from_iterable(("--config", file) for file in configs), *more]


def echat(*commands: list[str]) -> None:
    for command in commands:
        cli.main(command)


def keys(folder: Path, rank: int = 0) -> list[list[str]]:
    """Of the dialogues in each batch that a rank was given."""
    return torch.load(folder / f"rank{rank}.pt")["keys"]


def metrics(folder: Path, rank: int = 0) -> dict[str, float]:
    """Of the last validation."""
    return torch.load(folder / f"rank{rank}.pt")["metrics"]


@pytest.fixture(scope="module")
def one(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on one process."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    echat(fit(overlay, folder, trainer="cpu"))
    return folder


@pytest.fixture(scope="module")
def together(overlay: Path, one: Path) -> Path:
    """Of a run on two ranks that compute every batch together; of two steps, and `rest` of the other two."""
    folder, rest = one.with_name("together"), one.with_name("rest")
    first = fit(overlay, folder, "--trainer.max_steps", "2", trainer="tp", devices=2)
    second = fit(overlay, rest, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), trainer="tp", devices=2)
    run_on_ranks(echat, first, second)
    return folder


def test_two_ranks_that_compute_together_train_validate_and_go_on_as_one_process(one, together):
    """Each of them reads the batches that one process reads: dropout, augmentation and workers included."""
    rest = together.with_name("rest")
    curve, weights = recorded(one)
    assert len(curve) == STEPS and len({tuple(batch) for batch in keys(one)}) == STEPS
    for rank in (0, 1):
        assert keys(together, rank) + keys(rest, rank) == keys(one)
        assert metrics(rest, rank) == pytest.approx(metrics(one), rel=1e-4)
    assert {"val/speech_to_speech/loss/speech", "val/transcribe_and_label/accuracy/age"} <= metrics(one).keys()
    assert recorded(together)[0] + recorded(rest)[0] == pytest.approx(curve, rel=1e-5)
    assert_close(recorded(rest)[1], weights)
    health = [json.loads((folder / "data_health.json").read_text()) for folder in (one, rest)]
    assert health[1] == health[0] and health[0]["batches"] == STEPS


def assert_close(weights: dict[str, Any], expected: dict[str, Any]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_what_ranks_saved_that_compute_together_goes_on_anywhere_and_is_converted(tmp_path, one, together, overlay):
    """On one rank, on two that are sharded otherwise, as one file on a process that knows nothing of either."""
    saved = str(together / "checkpoints" / "last.ckpt")
    curve, weights = recorded(one)
    alone, whole, plain = tmp_path / "alone", tmp_path / "whole.ckpt", tmp_path / "plain"
    run_on_ranks(echat, fit(overlay, alone, "--ckpt_path", saved, trainer="fsdp"), ranks=1)
    echat(
        ["convert", "consolidate", saved, "--out", str(whole)],
        fit(overlay, plain, "--ckpt_path", str(whole), trainer="cpu"),
        ["convert", "to-hf", str(alone), "--out", str(tmp_path / "folder")],
    )
    for folder in (alone, plain):
        assert keys(folder) == keys(one)[2:]
        rest, ends = recorded(folder)
        assert rest == pytest.approx(curve[2:], rel=1e-5)
        assert_close(ends, weights)
    converted = load_trained(tmp_path / "folder").model.state_dict()
    for name, tensor in recorded(alone)[1].items():
        assert torch.equal(converted[name.removeprefix("model.")], tensor), name


@pytest.mark.slow
def test_two_groups_of_two_ranks_read_two_shares_and_train_as_one_process(tmp_path, overlay):
    """The ranks of a group are given the same batches, the groups others; a run goes on with as many groups."""
    still = ["--model.init_args.network.adapter.dropout", "0"]
    groups, rest, one = tmp_path / "groups", tmp_path / "rest", tmp_path / "one"
    saved = str(groups / "checkpoints" / "last.ckpt")
    run_on_ranks(
        echat,
        fit(overlay, groups, *still, "--trainer.max_steps", "2", trainer="tp", devices=4, window=2),
        fit(overlay, rest, *still, "--ckpt_path", saved, trainer="tp", devices=4, window=2),
        ranks=4,
    )
    both = "tests.experiments.test_tensor_parallel.BothShares"
    echat(fit(overlay, one, *still, "--data.class_path", both, trainer="cpu", window=4))
    read = [keys(groups, rank) + keys(rest, rank) for rank in range(4)]
    assert read[0] == read[1] and read[2] == read[3]
    assert read[0] == keys(one)[0::2] and read[2] == keys(one)[1::2] and read[0] != read[2]
    curve, weights = recorded(one, window=4)
    assert recorded(groups, window=2)[0] + recorded(rest, window=2)[0] == pytest.approx(curve, rel=1e-5)
    assert_close(recorded(rest, window=2)[1], weights)
    assert all(math.isfinite(value) for value in metrics(rest).values()) and metrics(rest) == metrics(rest, 3)
