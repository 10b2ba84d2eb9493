"""Speech codes as ids, and the order in which text and speech stand in a reply.

A spoken reply is text ids ending in the end of text, and speech ids that begin and end with the speech boundary. In the
sequential layout all text comes first. In the interleaved layout up to `TEXT_CHUNK` text ids alternate with up to
`SPEECH_CHUNK` speech ids; whichever stream ends first leaves the rest to the other.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_echat.contracts import SampleRejected
from lightning_echat.tokens.vocabulary import Vocabulary

TEXT_CHUNK = 6
SPEECH_CHUNK = 18


def codes_to_ids(codes: Tensor, vocabulary: Vocabulary) -> list[int]:
    """[n] speech codes -> [n + 2] ids with the boundary on both sides; `SampleRejected` for a code out of range."""
    values = codes.cpu().numpy().astype(np.int64)
    if not len(values):
        raise SampleRejected("no speech codes")
    if values.min() < 0 or values.max() >= vocabulary.codebook_size:
        raise SampleRejected("speech code out of range", f"codes must lie in [0, {vocabulary.codebook_size})")
    boundary = vocabulary.speech_boundary
    return [boundary, *(values + vocabulary.first_code).tolist(), boundary]


def ids_to_codes(ids: list[int], vocabulary: Vocabulary) -> Tensor:
    """The speech codes among `ids`, in order; text ids and boundaries are left out."""
    codes = [i - vocabulary.first_code for i in ids if vocabulary.first_code <= i < vocabulary.speech_boundary]
    return torch.tensor(codes, dtype=torch.long)


def interleave(text_ids: list[int], speech_ids: list[int]) -> list[int]:
    """Chunks of 6 text and 18 speech ids in turn, until both streams are used up."""
    mixed: list[int] = []
    text_at = speech_at = 0
    while text_at < len(text_ids) or speech_at < len(speech_ids):
        mixed += text_ids[text_at : text_at + TEXT_CHUNK]
        mixed += speech_ids[speech_at : speech_at + SPEECH_CHUNK]
        text_at += TEXT_CHUNK
        speech_at += SPEECH_CHUNK
    return mixed


def repetition_rate(codes: Tensor, *, length: int = 4) -> float:
    """Share of the runs of `length` codes that have occurred before in the same answer; 0 where there are too few.

    It is seq-rep-n of the text generation literature: 0 for no run twice, near 1 for a decoder that is stuck.
    """
    if codes.numel() < length:
        return 0.0
    runs = codes.unfold(0, length, 1)
    return 1.0 - len(runs.unique(dim=0)) / len(runs)
