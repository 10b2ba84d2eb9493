"""The loss is one mean over all that is supervised, however it is spread over ranks and micro-batches."""

import os
import socket
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import collate
from lightning_echat.stages.base import AuxiliaryWeights
from lightning_echat.stages.empathy import EmpathyStage
from lightning_echat.testing import dummy_tokenized, tiny_network_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name

MICRO_BATCHES = [
    # Two optimizer steps of two micro-batches on two ranks. What a rank has in a step differs in every way: number of
    # dialogues, length, kind of target, audio or none, nothing at all.
    ["speech_to_speech.label_thinking", "transcribe_and_label", "label"],
    ["text_to_text"],
    ["text_to_speech", "text_to_speech"],
    ["speech_to_text.natural_thinking"],
    ["label"],
    ["text_to_text", "text_to_text", "text_to_text"],
    ["speech_to_speech.interleaved", "transcribe"],
    [],
]


class Listed(LightningDataModule):
    """Ready batches, dealt out to the ranks in turn."""

    def __init__(self, batches: list[PackedBatch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader[PackedBatch]:
        assert self.trainer is not None
        own = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(own, batch_size=None, shuffle=False)  # type: ignore[arg-type]


class SaveAtEnd(Callback):
    """Each rank writes down the weights it ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True, parents=True)
        torch.save(pl_module.state_dict(), self.folder / f"rank{trainer.global_rank}.pt")


def train(tokens, batches: list[PackedBatch], folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    stage = EmpathyStage(
        tokens=tokens,
        network=tiny_network_config(auxiliary_labels=("age", "emotion")),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        auxiliary=AuxiliaryWeights(ctc=0.3, labels=2.0),
    )
    stage.configure_model()
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=1,
        callbacks=[SaveAtEnd(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(stage, datamodule=Listed(batches))
    return torch.load(folder / f"rank{trainer.global_rank}.pt")


def batches_of(tokenizer: DialogueTokenizer) -> tuple[list[PackedBatch], list[PackedBatch]]:
    """The micro-batches, and the same dialogues as one batch a step."""
    number = 0
    micro, dialogues = [], []
    for names in MICRO_BATCHES:
        dialogues.append([])
        for name in names:
            task = task_from_name(name, labels=("age",))
            dialogues[-1].append(dummy_tokenized(tokenizer, task, number=number, exchanges=1 + number % 2))
            number += 1
        micro.append(collate(dialogues[-1], padding=tokenizer.vocabulary.padding))
    whole = [collate(list(chain(*dialogues[at : at + 4])), padding=tokenizer.vocabulary.padding) for at in (0, 4)]
    return micro, whole


CLIPS = (None, 0.5)


def run_rank(rank: int, port: int, tokens: TokensConfig, folder: Path) -> None:
    """One of two processes, started as a cluster starts them."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    for clip in CLIPS:
        options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "gradient_clip_val": clip}
        train(tokens, micro, folder / str(clip), **options)


def test_two_ranks_that_accumulate_train_as_one_big_batch(tmp_path, tokens, tokenizer):
    """With clipping too, which must see the gradient of the mean and not one that is divided later."""
    micro, whole = batches_of(tokenizer)
    assert len({batch.num_supervised for batch in micro}) == len(micro)
    assert [batch.log_mels.shape[0] > 0 for batch in micro].count(False) == 4
    spawn(run_rank, args=(_free_port(), tokens, tmp_path), nprocs=2)
    ends = []
    for clip in CLIPS:
        one = train(tokens, whole, tmp_path / "one" / str(clip), gradient_clip_val=clip)
        first, second = (torch.load(tmp_path / str(clip) / f"rank{rank}.pt") for rank in (0, 1))
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name]), f"the ranks differ in {name}"
            torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        ends.append(one)
    # Clipping was felt, and both went somewhere.
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) > 1e-2


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulating_on_one_rank_trains_as_one_big_batch(tmp_path, tokens, tokenizer, accumulate):
    """Also where the last window is cut short by the end of the data."""
    micro, _ = batches_of(tokenizer)
    micro = micro[:4]
    windows = [micro[at : at + accumulate] for at in range(0, 4, accumulate)]
    joined = [_joined(tokenizer, at, len(window)) for at, window in zip(range(0, 4, accumulate), windows, strict=True)]
    one = train(tokens, joined, tmp_path / "one")
    spread = train(tokens, micro, tmp_path / "spread", accumulate_grad_batches=accumulate)
    for name, tensor in one.items():
        torch.testing.assert_close(spread[name], tensor, atol=1e-5, rtol=1e-5)


def _joined(tokenizer: DialogueTokenizer, first: int, count: int) -> PackedBatch:
    before = sum(len(names) for names in MICRO_BATCHES[:first])
    names = list(chain(*MICRO_BATCHES[first : first + count]))
    dialogues = [
        dummy_tokenized(
            tokenizer, task_from_name(name, labels=("age",)), number=before + place, exchanges=1 + (before + place) % 2
        )
        for place, name in enumerate(names)
    ]
    return collate(dialogues, padding=tokenizer.vocabulary.padding)
