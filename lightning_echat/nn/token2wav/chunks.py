"""Codes to a waveform piece by piece, such that the pieces together are the waveform of all codes at once.

A decoder looks at its neighbourhood, so a piece cut out of context sounds different at its ends. Each piece is thus
made with some codes before it (`context`) and after it (`look_ahead`), and only its middle is kept. What is left of a
difference at a join is faded over: what a piece made of the samples behind it mixes into the beginning of the next.

    codes     … c c c c | p p p p p p p p | a a a …        context, piece, look-ahead
    kept                  ~~~-------------                 ~ faded with what the piece before made of these samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.interface import Token2Wav


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How a stream of codes is cut.

    Attributes:
        first: Codes of the first piece; few, since all that follows can be made while it is heard.
        codes: Codes of every later piece.
        context: Codes before a piece that are decoded along with it.
        look_ahead: Codes after a piece that must have come before it is made.
        fade: Seconds over which a piece mixes into the next; at most the look-ahead.
    """

    first: int = 10
    codes: int = 25
    context: int = 10
    look_ahead: int = 5
    fade: float = 0.04

    def __post_init__(self) -> None:
        """Refuse what cannot be cut."""
        if self.first < 1 or self.codes < 1:
            raise UserError(f"chunks of {self.first} and {self.codes} codes: a piece has at least one")
        if self.context < 0 or self.look_ahead < 0 or self.fade < 0:
            raise UserError("context, look_ahead and fade of chunks must be at least 0")


class WaveformStream:
    """One answer's waveform, growing with its codes.

    Cost: each code is decoded (codes + context + look_ahead) / codes times as often as at once.

    Args:
        token2wav: Makes waveforms; any that gives the same number of samples for each code.
        config: How codes are cut.

    Attributes:
        sample_rate: Hz of the pieces.
    """

    def __init__(self, token2wav: Token2Wav, config: ChunkConfig | None = None) -> None:
        self.config = config or ChunkConfig()
        self.sample_rate = token2wav.sample_rate
        self._token2wav = token2wav
        per_code = token2wav.sample_rate / token2wav.code_rate
        if per_code != round(per_code):
            raise ValueError(f"{per_code} samples a code: a stream needs a whole number")
        self._per_code = round(per_code)
        if self.config.fade * self.sample_rate > self.config.look_ahead * self._per_code:
            longest = self.config.look_ahead / token2wav.code_rate
            raise UserError(f"chunks: a fade of {self.config.fade} s is longer than the look-ahead, {longest:.2f} s")
        self._fade = round(self.config.fade * self.sample_rate)
        self._codes: list[int] = []  # the context and what has not been made yet
        self._context = 0  # how many of them are context
        self._start = 0  # how many codes of the answer are before them
        self._tail: Tensor | None = None  # [fade] what the last piece made of the samples behind it
        self._pieces = 0

    def push(self, codes: Sequence[int]) -> list[Tensor]:
        """Add codes; the pieces that they complete, [samples] float32 each."""
        self._codes += codes
        pieces = []
        while len(self._codes) - self._context >= self._piece + self.config.look_ahead:
            pieces.append(self._make(self._piece))
        return pieces

    def finish(self) -> list[Tensor]:
        """There are no more codes: the last piece, none where nothing is left."""
        left = len(self._codes) - self._context
        return [self._make(left)] if left else []

    @property
    def _piece(self) -> int:
        return self.config.codes if self._pieces else self.config.first

    def _make(self, count: int) -> Tensor:
        """The next `count` codes as a waveform."""
        start, end = self._context, self._context + count
        window = self._codes[: end + self.config.look_ahead]
        waveform = self._token2wav.decode(torch.tensor(window), start=self._start).float()
        piece = waveform[start * self._per_code : end * self._per_code].clone()
        if self._tail is not None:
            length = min(len(self._tail), len(piece))
            rising = torch.linspace(0, 1, length + 2, device=piece.device)[1:-1]
            piece[:length] = rising * piece[:length] + (1 - rising) * self._tail[:length]
        self._tail = waveform[end * self._per_code :][: self._fade].clone() if len(window) > end else None
        self._context = min(end, self.config.context)
        self._codes = self._codes[end - self._context :]
        self._start += end - self._context
        self._pieces += 1
        return piece
