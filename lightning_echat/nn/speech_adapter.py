"""Speech frames -> embeddings of the language model: causal convolutions, a small transformer, a projection.

The reference's adapter: three causal convolutions (strides 1, 2, 2), four pre-norm layers with ReLU over sinusoidal
positions, and a linear map to the language model's width. 50 frames a second become 12.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_echat.nn.speech_encoder import length_mask
from lightning_echat.tokens.speech_timing import strided_length


@dataclass(frozen=True, kw_only=True)
class SpeechAdapterConfig:
    """Sizes of the adapter; the defaults are the reference's.

    Attributes:
        strides: One causal convolution of three frames for each.
        layers, heads, feedforward: Of the transformer, at the encoder's width.
        dropout: While training.
    """

    strides: tuple[int, ...] = (1, 2, 2)
    layers: int = 4
    heads: int = 4
    feedforward: int = 2560
    dropout: float = 0.1


def interleaved_sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """[length, width] the classic position code: sine and cosine alternate."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates[None]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class SpeechAdapter(nn.Module):
    """Brings encoder frames to the rate and the width of the language model."""

    def __init__(self, config: SpeechAdapterConfig, *, encoder_width: int, llm_width: int) -> None:
        super().__init__()
        self.config = config
        self.convolutions = nn.ModuleList(
            nn.Conv1d(encoder_width, encoder_width, kernel_size=3, stride=stride) for stride in config.strides
        )
        self.embed = nn.Sequential(
            nn.Linear(encoder_width, encoder_width), nn.LayerNorm(encoder_width), nn.Dropout(config.dropout)
        )
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                encoder_width,
                config.heads,
                config.feedforward,
                config.dropout,
                activation="relu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(encoder_width)
        self.projection = nn.Linear(encoder_width, llm_width)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[C, F, E] encoder frames and [C] lengths -> [C, n, D] embeddings and [C] lengths, n = Π ceil(F / stride)."""
        hidden = frames.transpose(1, 2)
        for convolution, stride in zip(self.convolutions, self.config.strides, strict=True):
            hidden = F.gelu(convolution(F.pad(hidden, (2, 0))))
            lengths = strided_length(lengths, stride)
        mask = length_mask(lengths, hidden.shape[2])
        hidden = self.embed(hidden.transpose(1, 2))
        width = hidden.shape[2]
        positions = interleaved_sinusoids(hidden.shape[1], width, hidden.device).to(hidden.dtype)
        hidden = F.dropout(hidden * math.sqrt(width) + positions, self.config.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~mask)
        return self.projection(self.norm(hidden)), lengths
