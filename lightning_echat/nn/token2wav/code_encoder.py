"""Speech codes to frames: a transformer over the codes, whose outputs are stretched to the length of the mel.

The layers are those of the flow of CosyVoice-300M (ESPnet's: relative positions after Dai et al. 2019, no convolution),
so that its weights fit (`cosyvoice_layout`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_echat.nn.token2wav.masked_norm import MaskedGroupNorm, masked


@dataclass(frozen=True, kw_only=True)
class CodeEncoderConfig:
    """Sizes. The defaults are those of CosyVoice-300M.

    Attributes:
        width: Of the code embedding and of every layer.
        layers, heads, feedforward: Of the transformer.
        stretched_layers: Convolutions after the stretching.
        dropout: Everywhere in it.
    """

    width: int = 512
    layers: int = 6
    heads: int = 8
    feedforward: int = 2048
    stretched_layers: int = 4
    dropout: float = 0.1


class CodeEncoder(nn.Module):
    """[B, n] codes -> [B, F, bins], one vector a mel frame."""

    def __init__(self, config: CodeEncoderConfig, *, codebook_size: int, bins: int) -> None:
        super().__init__()
        self.width = config.width
        self.embedding = nn.Embedding(codebook_size, config.width)
        self.input = nn.Sequential(nn.Linear(config.width, config.width), nn.LayerNorm(config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, bins)
        self.stretched = _Convolutions(bins, layers=config.stretched_layers)

    def forward(
        self, codes: Tensor, code_lengths: Tensor, frame_lengths: Tensor, *, frames: int | None = None
    ) -> Tensor:
        """One vector a frame.

        Args:
            codes: [B, n] int64, anything valid after the end.
            code_lengths: [B] int64.
            frame_lengths: [B] int64 mel frames that each row is stretched to.
            frames: F, where it is not the largest of these.

        Returns:
            [B, F, bins], 0 after a row's end. A row comes out the same in any batch.
        """
        stretched = _stretch(self._encode(codes, code_lengths), code_lengths, frame_lengths, frames=frames)
        # One frame of a row of none, as a norm needs something to be over.
        valid = torch.arange(stretched.shape[1], device=codes.device) < frame_lengths[:, None].clamp_min(1)
        mask = valid[:, None].to(stretched.dtype)
        return masked(self.stretched(stretched.transpose(1, 2), mask), mask).transpose(1, 2)

    def of_parts(self, codes: Tensor, *, parts: list[tuple[int, int]], rest: int) -> Tensor:
        """The same for one row whose beginning falls into parts that are stretched apart.

        Args:
            codes: [1, n] int64.
            parts: Codes and frames of each part from the beginning on.
            rest: Frames of the codes that remain.

        Returns:
            [1, F, bins].
        """
        encoded = self._encode(codes, codes.new_tensor([codes.shape[1]]))
        stretched, start = [], 0
        for length, frames in [*parts, (codes.shape[1] - sum(length for length, _ in parts), rest)]:
            part = encoded[:, start : start + length]
            stretched.append(_stretch(part, codes.new_tensor([length]), codes.new_tensor([frames])))
            start += length
        return self.stretched(torch.cat(stretched, dim=1).transpose(1, 2), None).transpose(1, 2)

    def _encode(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """[B, n] -> [B, n, bins]."""
        valid = torch.arange(codes.shape[1], device=codes.device) < lengths[:, None].clamp_min(1)
        x = self.dropout(self.input(self.embedding(codes) * valid[..., None])) * math.sqrt(self.width)
        x = self.dropout(x)
        positions = self.dropout(_relative_positions(codes.shape[1], like=x))
        for layer in self.layers:
            x = layer(x, positions, valid)
        return self.projection(self.norm(x))


class _Layer(nn.Module):
    """Pre-norm: attention with relative positions, then a feed-forward of Swish."""

    def __init__(self, config: CodeEncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.attention = _RelativeAttention(width, config.heads)
        self.feedforward = nn.Sequential(
            nn.Linear(width, config.feedforward),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward, width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), positions, valid))
        return x + self.dropout(self.feedforward(self.feedforward_norm(x)))


class _RelativeAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.position = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, width // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, x: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """[B, n, D], [2n - 1, D] and [B, n] bool -> [B, n, D]."""
        query, key, value = (self._split(part(x)) for part in (self.query, self.key, self.value))
        position = self._split(self.position(positions)[None])
        by_distance = (query + self.position_bias[:, None]) @ position.transpose(-1, -2)
        bias = _by_key(by_distance) / math.sqrt(query.shape[-1])
        bias = bias.masked_fill(~valid[:, None, None], -torch.inf)
        heard = functional.scaled_dot_product_attention(query + self.content_bias[:, None], key, value, attn_mask=bias)
        return self.output(heard.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, heads, n, D / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _relative_positions(length: int, *, like: Tensor) -> Tensor:
    """[2n - 1, D]: sines and cosines of the distances n - 1, …, -(n - 1) between query and key."""
    width = like.shape[-1]
    distances = torch.arange(length - 1, -length, -1.0, device=like.device)
    rates = torch.exp(torch.arange(0.0, width, 2.0, device=like.device) * (-math.log(10_000.0) / width))
    angles = distances[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(like.dtype)


def _by_key(by_distance: Tensor) -> Tensor:
    """[…, n, 2n - 1] over distances -> […, n, n] over keys: query i and key j are at distance i - j."""
    queries, distances = by_distance.shape[-2:]
    # Row i is needed from column n - 1 - i on. A column more, read row by row in the old width, shifts by one a row.
    padded = functional.pad(by_distance, (1, 0)).flatten(-2)
    shifted = padded[..., queries:].unflatten(-1, (queries, distances))
    return shifted[..., :queries]


def _stretch(x: Tensor, lengths: Tensor, targets: Tensor, *, frames: int | None = None) -> Tensor:
    """Each row from its length to its target by linear interpolation: [B, n, D] -> [B, F, D], 0 after the end.

    Every frame reads from its own row's valid part alone, so a row comes out the same in any batch.
    """
    number = torch.arange(int(targets.max()) if frames is None else frames, device=x.device)
    ratio = lengths / targets.clamp_min(1)
    last = (lengths - 1).clamp_min(0)
    place = ((number + 0.5) * ratio[:, None] - 0.5).clamp_min(0.0)
    place = torch.minimum(place, last[:, None].to(place.dtype))
    left = place.long()
    right = torch.minimum(left + 1, last[:, None])
    share = (place - left)[..., None].to(x.dtype)
    index = left[..., None].expand(-1, -1, x.shape[-1]), right[..., None].expand(-1, -1, x.shape[-1])
    stretched = x.gather(1, index[0]) * (1 - share) + x.gather(1, index[1]) * share
    return stretched * (number < targets[:, None])[..., None]


class _Convolutions(nn.Module):
    """[B, bins, F] and [B, 1, F] of valid frames, None for all -> [B, bins, F]."""

    def __init__(self, bins: int, *, layers: int) -> None:
        super().__init__()
        blocks = [(nn.Conv1d(bins, bins, 3, padding=1), MaskedGroupNorm(1, bins), nn.Mish()) for _ in range(layers)]
        self.layers = nn.Sequential(*(part for block in blocks for part in block), nn.Conv1d(bins, bins, 1))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask) if isinstance(layer, MaskedGroupNorm) else layer(masked(x, mask))
        return x
