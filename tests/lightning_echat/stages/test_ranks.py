"""The loss is one mean over all that is supervised, however it is spread over ranks and micro-batches."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import collate
from lightning_echat.testing import dummy_tokenized
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import task_from_name
from tests.ranks import run_on_ranks
from tests.tiny_training import MICRO_BATCHES, batches_of, make_stage, recorded, train

CLIPS = (None, 0.5)


def train_with_each_clip(tokens: TokensConfig, folder: Path) -> None:
    micro, _ = batches_of(DialogueTokenizer.from_config(tokens))
    for clip in CLIPS:
        options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "gradient_clip_val": clip}
        train(make_stage(tokens), micro, folder / str(clip), **options)


def test_two_ranks_that_accumulate_train_as_one_big_batch(tmp_path, tokens, tokenizer):
    """With clipping too, which must see the gradient of the mean and not one that is divided later."""
    micro, whole = batches_of(tokenizer)
    assert len({batch.num_supervised for batch in micro}) == len(micro)
    assert [batch.log_mels.shape[0] > 0 for batch in micro].count(False) == 4
    run_on_ranks(train_with_each_clip, tokens, tmp_path)
    ends = []
    for clip in CLIPS:
        train(make_stage(tokens), whole, tmp_path / "one" / str(clip), gradient_clip_val=clip)
        _, one = recorded(tmp_path / "one" / str(clip))
        first, second = (torch.load(tmp_path / str(clip) / f"rank{rank}.pt")["weights"] for rank in (0, 1))
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name]), f"the ranks differ in {name}"
            torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        ends.append(one)
    # Clipping was felt, and both went somewhere.
    assert max(float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]) > 1e-2


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_accumulating_on_one_rank_trains_as_one_big_batch(tmp_path, tokens, tokenizer, accumulate):
    """Also where the last window is cut short by the end of the data."""
    micro, _ = batches_of(tokenizer)
    micro = micro[:4]
    windows = [micro[at : at + accumulate] for at in range(0, 4, accumulate)]
    joined = [_joined(tokenizer, at, len(window)) for at, window in zip(range(0, 4, accumulate), windows, strict=True)]
    train(make_stage(tokens), joined, tmp_path / "one")
    train(make_stage(tokens), micro, tmp_path / "spread", accumulate_grad_batches=accumulate)
    _, one = recorded(tmp_path / "one")
    _, spread = recorded(tmp_path / "spread")
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
