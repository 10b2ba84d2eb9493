"""From logits to ids: best or drawn, with control of repetition, row by row.

Everything is a function of one row's logits, its own random numbers and its own recent ids, so what a row writes does
not depend on who else is in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_echat.contracts import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How an id is chosen.

    Attributes:
        temperature: 0 takes the best id; above, ids are drawn.
        top_k: Draw among so many best ids; 0 for all.
        top_p: Draw among the fewest best ids that hold this probability together; 1 for all.
        repetition_penalty: Divides positive logits of recent ids and multiplies negative ones; 1 for none. It acts on
            best and drawn ids alike.
        repetition_window: Ids of the same phase that count as recent.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_window: int = 20

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} must be at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be at least 0; 0 draws among all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.repetition_penalty < 1:
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be at least 1; 1 is none")
        if self.repetition_window < 1:
            raise UserError(f"repetition_window {self.repetition_window} must be at least 1")


def choose(logits: Tensor, config: SamplingConfig, uniforms: Tensor | None = None) -> Tensor:
    """One id per row.

    Args:
        logits: [R, V] float.
        config: Temperature and cuts.
        uniforms: [R] float64 in [0, 1), what each row draws with; unused at temperature 0.

    Returns:
        [R] int64.
    """
    if config.temperature == 0:
        return logits.argmax(1)
    if uniforms is None:
        raise ValueError("a temperature above 0 needs random numbers")
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[1]:
        least = logits.topk(config.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(1)
    if config.top_p < 1:
        probabilities = _nucleus(probabilities, config.top_p)
    # By the inverse of the distribution function: a row needs one number of its own, where multinomial would draw all
    # rows from one stream.
    cumulative = probabilities.double().cumsum(1)
    total = cumulative[:, -1]
    reached = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, reached[:, None], right=True)[:, 0]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[R, V] with zeros outside the fewest best ids that hold `top_p`; the best one always stays."""
    ordered, places = probabilities.sort(1, descending=True)
    # What is before an id; nothing is before the best one, and `top_p` is above 0.
    outside = ordered.cumsum(1) - ordered >= top_p
    return probabilities.masked_fill(torch.zeros_like(outside).scatter(1, places, outside), 0.0)


class RepetitionWindow:
    """The last ids of every row in one phase, and the penalty for writing them again. All of it stays on the device.

    Args:
        rows: Rows of the batch.
        config: Penalty and window.
        exempt: Ids (within the head) that are never penalised.
        device: Where the logits are.
    """

    def __init__(self, rows: int, config: SamplingConfig, *, exempt: Sequence[int], device: torch.device) -> None:
        self.penalty = config.repetition_penalty
        self._recent = torch.full((rows, config.repetition_window), -1, device=device)
        self._exempt = torch.tensor(sorted(exempt), dtype=torch.long, device=device)

    def penalise(self, logits: Tensor, rows: Tensor) -> Tensor:
        """[r, V] logits of the batch's `rows` ([r]), with recent ids made less likely."""
        recent = self._recent[rows]
        # One class more takes what stands for "nothing yet".
        repeated = logits.new_zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool)
        repeated.scatter_(1, recent.where(recent >= 0, logits.shape[1]), True)
        repeated[:, self._exempt] = False
        lower = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(repeated[:, :-1], lower, logits)

    def add(self, ids: Tensor, rows: Tensor) -> None:
        """Note what `rows` ([r]) have written ([r] ids within the head)."""
        self._recent[rows] = torch.cat([self._recent[rows, 1:], ids[:, None]], dim=1)


def uniforms_of(keys: Sequence[str], *, seed: int, steps: int) -> Tensor:
    """[R, steps] float64 in [0, 1): what each item draws with. It follows from seed and key alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, steps, dtype=torch.float64)
