"""Shares of padding of the training loader over a corpus, padded and packed, beside batches of the order they come in.

    python benchmarks/padding.py --speech CORPUS/train --text CORPUS/text --tokenizer FOLDER

The corpus is the quickstart's (`make quickstart` leaves it in runs/quickstart/corpus, its tokenizer in
runs/quickstart/audio/tokenizer).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import islice

from lightning_echat.contracts import PackedBatch
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.dialogue_stream import ReadingConfig
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.mixture import SourceConfig, TaskConfig
from lightning_echat.data.training_stream import TrainingStream
from lightning_echat.tokens.dialogue_template import TokensConfig

_QUICKSTART = BatchingConfig(tokens_per_batch=520, max_ids=512, max_rows=16, pool=480, frames_weight=0.25, shuffle=512)
_PACKED = BatchingConfig(tokens_per_batch=4096, max_ids=2048, packed=True)
# A window that holds no more than two batches has nothing to choose from.
_SIZES = {
    "quickstart, padded": _QUICKSTART,
    "quickstart, padded, no window": replace(_QUICKSTART, pool=1),
    "defaults, padded": BatchingConfig(),
    "defaults, padded, no window": BatchingConfig(pool=1),
    "4,096 ids, packed": _PACKED,
    "4,096 ids, packed, no window": replace(_PACKED, pool=1),
}


def main() -> None:
    """Print one line for each way of batching."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", default="runs/quickstart/corpus/train", help="folder of shards of spoken dialogues")
    parser.add_argument("--text", default="runs/quickstart/corpus/text", help="folder of shards of written dialogues")
    parser.add_argument("--tokenizer", default="runs/quickstart/audio/tokenizer", help="folder of the text tokenizer")
    parser.add_argument("--ids", type=int, default=150_000, help="ids to read for each line")
    given = parser.parse_args()
    tokens = TokensConfig(tokenizer=given.tokenizer, text_vocabulary_size=1280, codebook_size=256, prompt_set="compact")
    tasks = [
        TaskConfig(kind="speech_to_speech", thinking="label"),
        TaskConfig(kind="speech_to_text", thinking="label"),
        TaskConfig(kind="transcribe_and_label", labels=("age", "emotion")),
        TaskConfig(kind="transcribe"),
    ]
    sources = [
        SourceConfig(name="speech", shards=[given.speech], weight=4, tasks=tasks),
        SourceConfig(name="text", shards=[given.text], tasks=[TaskConfig(kind="text_to_text")]),
    ]
    sys.stdout.write(f"{'':30} {'ids padded':>10} {'frames padded':>13} {'batches':>8} {'of several tasks':>16}\n")
    for name, batching in _SIZES.items():
        stream = TrainingStream(ReadingConfig(tokens=tokens, batching=batching), sources=sources)
        count = -(-given.ids // batching.tokens_per_batch)
        sys.stdout.write(f"{name:30} {_line(list(islice(TrainingLoader(stream, num_workers=0), count)))}\n")
        sys.stdout.flush()


def _line(batches: list[PackedBatch]) -> str:
    positions = sum(batch.document_ids.numel() for batch in batches)
    frames = sum(batch.log_mels.shape[0] * batch.log_mels.shape[1] for batch in batches)
    ids = 1 - sum(batch.num_tokens for batch in batches) / positions
    heard = 1 - sum(int(batch.log_mel_lengths.sum()) for batch in batches) / max(frames, 1)
    mixed = sum(len({reference.task for reference in batch.references}) > 1 for batch in batches)
    return f"{ids:10.2%} {heard:13.2%} {len(batches):8} {mixed:16}"


if __name__ == "__main__":
    main()
