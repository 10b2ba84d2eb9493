"""How long a user waits: for the first word, the first code, the first sound, and between pieces of sound.

    python -m benchmarks.latency
    python -m benchmarks.latency --checkpoint runs/quickstart/empathy --requests 1 4
    python -m benchmarks.latency --size 3b --device cuda --precision bf16 --out benchmarks/results/latency_3b.json

Without a checkpoint the network has random weights and the sizes of the quickstart. It would never end its thinking, so
what it writes is replaced, after it has been computed, by a script of usual lengths. Times are medians over answers.
Baselines, measured in the same run: "at once" writes the whole answer and then makes its sound; "one by one" answers
the dialogues of a batch singly.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import yaml

from benchmarks.networks import SIZES, network_of, tokens_of
from lightning_echat import decoding
from lightning_echat.contracts import DialogueSample, PackedBatch
from lightning_echat.data.batching import collate
from lightning_echat.data.log_mel import LogMel
from lightning_echat.decoding import DecodingConfig, generate
from lightning_echat.evaluation.chat import open_voice
from lightning_echat.evaluation.machine import machine_facts
from lightning_echat.nn.echat_model import EChatModel
from lightning_echat.nn.token2wav.interface import Token2Wav
from lightning_echat.nn.token2wav.kmeans import FRAMES_PER_CODE, MEL_BINS, FitReport, KMeansSpeechTokenizer
from lightning_echat.nn.weights import load_trained, network_from_settings
from lightning_echat.reply_writer import ReplyWriter
from lightning_echat.streaming import AnswerTiming, stream_answer
from lightning_echat.testing import dummy_audio, tiny_tokens_config
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig
from lightning_echat.tokens.tasks import DialogueTask

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart" / "small.yaml"
_THINKING_IDS, _TEXT_IDS, _CODES = 40, (8, 16), (50, 100)
"""Of a scripted answer. 100 codes are 4 s."""


@dataclass(slots=True, kw_only=True)
class Subject:
    """What is measured."""

    model: EChatModel
    tokenizer: DialogueTokenizer
    tokens: TokensConfig
    voice: Token2Wav
    config: DecodingConfig
    device: torch.device
    scripted: bool


class ScriptedWriter(ReplyWriter):
    """Writes answers of usual lengths, whatever the heads chose; row after row is a little longer."""

    def __init__(self, *args: Any, numbers: Iterator[int]) -> None:
        super().__init__(*args)
        number = next(numbers)
        thinking = self._tokenizer.prompt_set.thinking
        spelled = thinking.open + "x" * (_THINKING_IDS - len(thinking.open + thinking.close)) + thinking.close
        words = _spread(_TEXT_IDS, number) * "y"
        self._text = self._tokenizer.encode((spelled if self._thinking else "") + words)
        self._codes = _spread(_CODES, number)

    def write(self, id: int) -> None:
        """Take the script's id instead."""
        vocabulary, counts = self._tokenizer.vocabulary, self._counts
        if self.phase == "speech":
            over = counts["speech"] > self._codes
            code = id if id != vocabulary.speech_boundary or counts["speech"] == 0 else vocabulary.first_code
            super().write(vocabulary.speech_boundary if over else code)
            return
        at = counts["thinking"] + counts["text"]
        super().write(self._text[at] if at < len(self._text) else vocabulary.end_of_text)


def _spread(span: tuple[int, int], number: int) -> int:
    return span[0] + number * 7 % (span[1] - span[0] + 1)


@contextmanager
def scripted(subject: Subject) -> Iterator[None]:
    """Within, random networks give answers of usual lengths."""
    numbers = iter(range(1_000_000))
    writer = partial(ScriptedWriter, numbers=numbers)
    with mock.patch.object(decoding, "ReplyWriter", writer) if subject.scripted else nullcontext():
        yield


def questions(subject: Subject, task: DialogueTask, count: int) -> list[PackedBatch]:
    """Batches of one dialogue: spoken questions of 1 to 3 seconds."""
    log_mel = LogMel(mel_bins=subject.tokens.mel_bins)
    batches = []
    for number in range(count):
        sample = spoken_question(log_mel, number)
        prompt = subject.tokenizer.prompt(sample, task)
        batches.append(collate([prompt], padding=subject.tokenizer.vocabulary.padding, mel_bins=subject.tokens.mel_bins))
    return [to_device(batch, subject.device) for batch in batches]
