"""What every speech tokenizer and every code vocoder is to the rest of the platform.

The two are apart because they may come apart: the k-means tokenizer of the quickstart is both in one folder, the 25 Hz
CosyVoice codes come from one network and become a waveform in another. docs/recipes.md has how to add a third kind.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.cosyvoice_tokenizer import CosyVoiceSpeechTokenizer, find_weights
from lightning_echat.nn.token2wav.kmeans import CONFIG_NAME, KMeansSpeechTokenizer
from lightning_echat.nn.token2wav.synthesizer import TOKEN2WAV_NAME, FlowToken2Wav


class SpeechTokenizer(Protocol):
    """Waveforms to codes. One waveform of n samples gives ceil(n · code_rate / sample_rate) codes.

    Attributes:
        codebook_size: Codes are in [0, codebook_size).
        code_rate: Codes a second.
        sample_rate: Hz of the waveforms that `encode` takes.
    """

    codebook_size: int
    code_rate: float
    sample_rate: int

    def encode(self, waveforms: Tensor, *, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[B, samples] float32 in [-1, 1] and [B] valid samples -> [B, codes] int64 (0 after the end) and [B] codes."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_speech_tokenizer` reads."""
        ...


class Token2Wav(Protocol):
    """Codes to a waveform.

    Attributes:
        codebook_size: Codes must be in [0, codebook_size).
        code_rate: Codes a second.
        sample_rate: Hz of the waveform.
    """

    codebook_size: int
    code_rate: float
    sample_rate: int

    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        """[codes] int64 -> [codes · sample_rate / code_rate] float32 in [-1, 1]. The same codes, the same waveform.

        Args:
            codes: All codes of an answer, or a stretch of them.
            start: Codes of the answer that come before a stretch, for what draws noise by its place in the answer.
        """
        ...


def load_speech_tokenizer(folder: Path) -> SpeechTokenizer:
    """The speech tokenizer of a folder: one that `echat data tokenize` has fitted, or CosyVoice's own weights.

    Raises:
        UserError: The folder holds none, or a damaged one.
    """
    if not (folder / CONFIG_NAME).is_file() and find_weights(folder) is not None:
        return CosyVoiceSpeechTokenizer.load(folder)
    return _fitted(folder)


def load_token2wav(folder: Path) -> Token2Wav:
    """What speaks the codes of a folder: a flow with its vocoder, or a k-means tokenizer, which is its own.

    Raises:
        UserError: The folder holds neither, or a damaged one.
    """
    if (folder / TOKEN2WAV_NAME).is_file():
        return FlowToken2Wav.load(folder)
    if not (folder / CONFIG_NAME).is_file() and find_weights(folder) is not None:
        raise UserError(
            f"{folder} holds a speech tokenizer that cannot speak; give the folder of echat convert token2wav"
        )
    return _fitted(folder)


def _fitted(folder: Path) -> KMeansSpeechTokenizer:
    kind = str(read_config(folder).get("kind"))
    if kind not in _KINDS:
        near = get_close_matches(kind, _KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_KINDS)}"
        raise UserError(f"{folder / CONFIG_NAME}: unknown kind {kind!r}{hint}")
    return _KINDS[kind].load(folder)


_KINDS = {"kmeans": KMeansSpeechTokenizer}


def read_config(folder: Path) -> dict[str, Any]:
    """The description of the speech tokenizer in a folder.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"no speech tokenizer in {folder} (no {CONFIG_NAME}); make one with echat data tokenize --fit true"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no object")
    return config
