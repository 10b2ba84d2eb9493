"""A small tokenizer in which every word of a corpus is one token, for models that train from nothing on two cores.

It is an ordinary Hugging Face tokenizer, byte-level BPE, so that any text survives encoding and decoding and nothing
that reads it knows that it is small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_echat.contracts import UserError
from lightning_echat.tokens.paralinguistics import LABEL_SETS, REPLY_EMOTIONS, write_label

MAX_VOCABULARY = 1200
"""Ids of the tokenizer, added tokens included."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING_MARKERS = ("<think>", "<think end>")


def label_tokens() -> list[str]:
    """The tag of every label and reply emotion, each once, and the markers around thinking."""
    labels = [label for known in LABEL_SETS.values() for label in known]
    return list(dict.fromkeys([write_label(label) for label in [*labels, *REPLY_EMOTIONS]] + list(THINKING_MARKERS)))


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a JSONL file whose rows hold "text"."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def fit_tokenizer(text_file: Path, out_dir: Path, *, extra_tokens: Sequence[str] | None = None) -> int:
    """Fit a tokenizer to a corpus and save it for `transformers.AutoTokenizer.from_pretrained(out_dir)`.

    Args:
        text_file: JSONL with a "text" in every row.
        out_dir: Folder to write.
        extra_tokens: Text that is one token wherever it stands, and is never stripped on decoding; by default
            `label_tokens()`.

    Returns:
        The size of the vocabulary.

    Raises:
        UserError: The file is missing or empty.
    """
    if not text_file.is_file():
        raise UserError(f"{text_file} does not exist; echat data synthesize writes it")
    texts = list(read_texts(text_file))
    if not texts:
        raise UserError(f"{text_file} holds no text to fit a tokenizer to")
    tokenizer = _train(texts, extra_tokens=label_tokens() if extra_tokens is None else extra_tokens)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(out_dir)
    return len(wrapped)


def _train(texts: Iterable[str], *, extra_tokens: Sequence[str]) -> Tokenizer:
    """Byte-level BPE whose merges go on until words are whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(extra_tokens),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not special: decoding with skip_special_tokens keeps them, as parsers of labels and thinking need.
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, single_word=False, lstrip=False, rstrip=False) for token in extra_tokens]
    )
    return tokenizer
