"""The network that a flow follows: a U-Net over mel frames of convolutions and transformer blocks.

It is Matcha-TTS's, as CosyVoice-300M uses it, so that its weights fit (`cosyvoice_layout`). Attention sees the whole
utterance, so its cost grows with the square of the frames: 6 s are 520 of them at 22 kHz.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.masked_norm import MaskedGroupNorm, masked


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """Sizes. The defaults are those of CosyVoice-300M.

    Attributes:
        channels: Of each level; between two levels the frames are halved. Multiples of 8.
        blocks: Transformer blocks after each convolution block.
        middle: Convolution blocks at the lowest level.
        heads, head_size: Of attention.
        dropout: Of the transformer blocks.
    """

    channels: tuple[int, ...] = (256, 256)
    blocks: int = 4
    middle: int = 12
    heads: int = 8
    head_size: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.channels or any(channels % _GROUPS for channels in self.channels):
            raise UserError(f"estimator: channels must be multiples of {_GROUPS}, not {list(self.channels)}")


_GROUPS = 8


class Estimator(nn.Module):
    """Noisy mel, time and conditions -> the velocity at that point of the way from noise to mel."""

    def __init__(self, config: EstimatorConfig, *, inputs: int, outputs: int) -> None:
        super().__init__()
        first, times = config.channels[0], 4 * config.channels[0]
        # Half of them are sines and half cosines.
        self.time_size = inputs - inputs % 2
        self.time = nn.Sequential(nn.Linear(self.time_size, times), nn.SiLU(), nn.Linear(times, times))
        sizes = (inputs, *config.channels)
        lowest = len(config.channels) - 1
        self.down = nn.ModuleList(
            _Level(config, sizes[i], sizes[i + 1], times, _down(sizes[i + 1], halves=i < lowest))
            for i in range(lowest + 1)
        )
        bottom = config.channels[-1]
        self.middle = nn.ModuleList(_Level(config, bottom, bottom, times, nn.Identity()) for _ in range(config.middle))
        rising = (*config.channels[::-1], first)
        self.up = nn.ModuleList(
            _Level(config, 2 * rising[i], rising[i + 1], times, _up(rising[i + 1], doubles=i < lowest))
            for i in range(lowest + 1)
        )
        self.final = _ConvBlock(first, first)
        self.output = nn.Conv1d(first, outputs, 1)

    def forward(self, x: Tensor, time: Tensor, valid: Tensor | None) -> Tensor:
        """The velocity. A row comes out the same in any batch.

        Args:
            x: [B, inputs, F], the noisy mel and all conditions.
            time: [B] in [0, 1].
            valid: [B, F] bool; None where all of it is, which takes less time.

        Returns:
            [B, outputs, F], 0 where nothing is valid.
        """
        at = self.time(_time_code(time, self.time_size).to(x.dtype))
        mask = None
        if valid is not None:
            # One frame of a row of none, or its attention would be over nothing, and NaN.
            mask = valid.index_fill(1, valid.new_zeros(1, dtype=torch.long), True)[:, None].to(x.dtype)
        masks, skipped = [mask], []
        for level in _levels(self.down):
            x = level.blocks_of(x, masks[-1], at)
            skipped.append(x)
            x = level.resize(masked(x, masks[-1]))
            halved = x.shape[-1] < skipped[-1].shape[-1]
            masks.append(masks[-1][..., ::2] if halved and masks[-1] is not None else masks[-1])
        masks.pop()
        for level in _levels(self.middle):
            x = level.blocks_of(x, masks[-1], at)
        for level in _levels(self.up):
            mask, skip = masks.pop(), skipped.pop()
            x = level.blocks_of(torch.cat([x[..., : skip.shape[-1]], skip], dim=1), mask, at)
            x = level.resize(masked(x, mask))
        x = self.final(x[..., : skip.shape[-1]], mask)
        return masked(self.output(masked(x, mask)), None if valid is None else valid[:, None])


def _down(channels: int, *, halves: bool) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, 3, stride=2 if halves else 1, padding=1)


def _up(channels: int, *, doubles: bool) -> nn.Module:
    if doubles:
        return nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)
    return nn.Conv1d(channels, channels, 3, padding=1)


def _time_code(time: Tensor, size: int) -> Tensor:
    """[B] -> [B, size]: sines and cosines of a thousandfold time."""
    half = size // 2
    rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000.0) / max(1, half - 1)))
    angles = 1000.0 * time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _levels(modules: nn.ModuleList) -> Iterator[_Level]:
    for module in modules:
        assert isinstance(module, _Level)
        yield module


class _Level(nn.Module):
    """A convolution block that knows the time, transformer blocks, and a change of rate that the caller applies."""

    def __init__(self, config: EstimatorConfig, inputs: int, outputs: int, times: int, resize: nn.Module) -> None:
        super().__init__()
        self.first, self.second = _ConvBlock(inputs, outputs), _ConvBlock(outputs, outputs)
        self.time = nn.Sequential(nn.Mish(), nn.Linear(times, outputs))
        self.residual = nn.Conv1d(inputs, outputs, 1)
        self.transformer = nn.ModuleList(_TransformerBlock(config, outputs) for _ in range(config.blocks))
        self.resize = resize

    def blocks_of(self, x: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
        """[B, inputs, F], [B, 1, F] and [B, times] -> [B, outputs, F]."""
        h = self.first(x, mask) + self.time(at)[..., None]
        x = (self.second(h, mask) + self.residual(masked(x, mask))).transpose(1, 2)
        seen = None if mask is None else mask[:, None].bool()
        for block in self.transformer:
            x = block(x, seen)
        return x.transpose(1, 2)


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, padding=1), MaskedGroupNorm(_GROUPS, outputs), nn.Mish()
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        convolution, norm, activation = self.layers
        return masked(activation(norm(convolution(masked(x, mask)), mask)), mask)


class _TransformerBlock(nn.Module):
    def __init__(self, config: EstimatorConfig, width: int) -> None:
        super().__init__()
        inner = config.heads * config.head_size
        self.heads = config.heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.output = nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.dropout)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        """[B, F, D] and [B, 1, 1, F] bool -> [B, F, D]."""
        normed = self.attention_norm(x)
        query, key, value = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        heard = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.dropout(self.output(heard.transpose(1, 2).flatten(2)))
        return x + self.feedforward(self.feedforward_norm(x))
