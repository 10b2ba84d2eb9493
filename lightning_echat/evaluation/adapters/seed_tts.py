"""SEED-TTS-eval: its list of utterances, and its word error rate.

`meta.lst` holds a line an utterance, fields parted by |:

    name|prompt text|prompt wav|text to speak[|recording of it]
    name|text to speak|prompt wav
    name|text to speak

It measures speech that was made from text, so that no query is asked; a synthesizer is run on `text`, a recogniser
(Whisper-large-v3 for English, Paraformer for Chinese in the original) on what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_echat.contracts import UserError
from lightning_echat.evaluation.text_units import characters_of, count_errors, words_of

NAME = "seed-tts"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedUtterance:
    """One line.

    Attributes:
        name: Of the utterance and of the wav that is made of it.
        text: What is to be spoken.
        prompt_text, prompt_audio: The voice to speak in, empty where none is given.
        recording: The same text spoken by a person, empty where there is none.
    """

    name: str
    text: str
    prompt_text: str = ""
    prompt_audio: str = ""
    recording: str = ""


def read_list(path: Path) -> Iterator[SeedUtterance]:
    """The utterances of a meta.lst.

    Raises:
        UserError: The file is missing, or a line has another number of fields.
    """
    if not path.is_file():
        raise UserError(f"no file {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        match [part.strip() for part in line.split("|")]:
            case [name, prompt_text, prompt, text, *rest] if len(rest) <= 1:
                recording = rest[0] if rest else ""
                yield SeedUtterance(
                    name=name, text=text, prompt_text=prompt_text, prompt_audio=prompt, recording=recording
                )
            case [name, text, prompt]:
                yield SeedUtterance(name=name.removesuffix(".wav"), text=text, prompt_audio=prompt)
            case [name, text]:
                yield SeedUtterance(name=name, text=text)
            case fields:
                raise UserError(f"{path}:{number}: {len(fields)} fields parted by |; a line has 2 to 5")


def mean_error_rate(heard: Sequence[str], said: Sequence[str], *, language: str) -> float:
    """Mean of the utterances' own error rates, not the rate over all: words for en, characters for zh. NaN without any.

    Our normalisation (`text_units`), without the conversion of traditional characters that the original makes.
    """
    rates = []
    for left, right in zip(heard, said, strict=True):
        hypothesis, reference = (
            words_of(text) if language == "en" else characters_of(text, language=language) for text in (left, right)
        )
        rates.append(count_errors([hypothesis], [reference]).rate)
    return sum(rates) / len(rates) if rates else float("nan")
