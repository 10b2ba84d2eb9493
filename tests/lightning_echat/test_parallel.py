"""The same numbers however the network is spread, and no rank that waits for another for ever."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_echat.parallel import ShardedStrategy
from lightning_echat.testing import tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from tests.ranks import run_on_ranks
from tests.tiny_training import batches_of, make_stage, recorded, train

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {},
    "fsdp, one replica a rank": {"replicas": 2},
    "fsdp, encoder computed again": {"again": "encoder"},
    "fsdp, llm computed again": {"again": "llm"},
    "fsdp, offloaded": {"cpu_offload": True},
}


def strategy_of(**options: Any) -> ShardedStrategy:
    return ShardedStrategy(timeout=timedelta(seconds=60), **options)


def train_case(tokens: TokensConfig, folder: Path, case: dict[str, Any]) -> None:
    options = dict(case)
    network = tiny_network_config(auxiliary_labels=("age", "emotion"))
    again = options.pop("again", None)
    if again is not None:
        network = replace(network, **{again: replace(getattr(network, again), gradient_checkpointing=True)})
    strategy = options.pop("strategy", None) or strategy_of(**options)
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    train(
        make_stage(tokens, network=network),
        micro,
        folder,
        strategy=strategy,
        devices=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )


def train_cases(tokens: TokensConfig, folder: Path) -> None:
    for name, case in CASES.items():
        train_case(tokens, folder / name, case)


def test_every_way_of_spreading_gives_the_curve_and_weights_of_one_process(tmp_path, tokens, tokenizer):
    """A loss that is divided by a rank's own ids, a norm of a part, a part that one rank does not reduce."""
    run_on_ranks(train_cases, tokens, tmp_path)
    _, whole = batches_of(tokenizer)
    train(make_stage(tokens), whole, tmp_path / "one", gradient_clip_val=0.5)
    curve, weights = recorded(tmp_path / "one")
    for name in CASES:
        spread, ends = recorded(tmp_path / name, window=2)
        assert spread == pytest.approx(curve, rel=1e-5), name
        for key, tensor in weights.items():
            torch.testing.assert_close(
                ends[key], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=(name, key): f"{n}: {m}"
            )
