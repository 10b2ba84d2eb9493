"""HiFi-GAN's discriminators, of several periods and of several scales, and its losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

_SLOPE = 0.1


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes. The defaults are HiFi-GAN's.

    Attributes:
        periods: One discriminator each, which sees every so many samples side by side.
        period_channels: Of its layers; all but the last take every third sample.
        scales: Discriminators of the waveform at the full rate, at half of it, …
        scale_channels: Of their layers.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    scales: int = 3
    scale_channels: tuple[int, ...] = (128, 128, 256, 512, 1024, 1024)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one discriminator says.

    Attributes:
        score: [B, n], 1 for real and 0 for made.
        features: Of every layer, as far as feature matching compares them.
    """

    score: Tensor
    features: list[Tensor]


class Discriminators(nn.Module):
    """[B, samples] -> one `Judgement` each."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.periods = nn.ModuleList(_Period(period, config.period_channels) for period in config.periods)
        # The first is held by its spectral norm, as the paper has it.
        self.scales = nn.ModuleList(
            _Scale(config.scale_channels, spectral=scale == 0) for scale in range(config.scales)
        )

    def forward(self, waveforms: Tensor) -> list[Judgement]:
        """See the class."""
        judgements = [period(waveforms) for period in self.periods]
        x = waveforms[:, None]
        for scale in self.scales:
            judgements.append(scale(x))
            x = functional.avg_pool1d(x, 4, stride=2, padding=2)
        return judgements


class _Period(nn.Module):
    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        last = len(channels) - 1
        self.layers = nn.ModuleList(
            parametrizations.weight_norm(
                nn.Conv2d(sizes[i], sizes[i + 1], (5, 1), stride=(3 if i < last else 1, 1), padding=(2, 0))
            )
            for i in range(len(channels))
        )
        self.score = parametrizations.weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveforms: Tensor) -> Judgement:
        x = functional.pad(waveforms[:, None], (0, -waveforms.shape[1] % self.period), mode="reflect")
        return _judge(x.unflatten(-1, (-1, self.period)), self.layers, self.score)


class _Scale(nn.Module):
    """Wide kernels with strides; groups keep the wide layers small."""

    def __init__(self, channels: Sequence[int], *, spectral: bool) -> None:
        super().__init__()
        norm = parametrizations.spectral_norm if spectral else parametrizations.weight_norm
        sizes = [1, *channels]
        self.layers = nn.ModuleList(norm(_scale_layer(sizes[i], sizes[i + 1], i)) for i in range(len(channels)))
        self.score = norm(nn.Conv1d(sizes[-1], 1, 3, padding=1))

    def forward(self, x: Tensor) -> Judgement:
        return _judge(x, self.layers, self.score)


def _scale_layer(inputs: int, outputs: int, place: int) -> nn.Conv1d:
    if place == 0:
        return nn.Conv1d(inputs, outputs, 15, padding=7)
    stride = 2 if place < 3 else 4
    return nn.Conv1d(inputs, outputs, 41, stride=stride, groups=gcd(16, gcd(inputs, outputs)), padding=20)


def _judge(x: Tensor, layers: nn.ModuleList, score: nn.Module) -> Judgement:
    features = []
    for layer in layers:
        x = functional.leaky_relu(layer(x), _SLOPE)
        features.append(x)
    x = score(x)
    return Judgement(x.flatten(1), [*features, x])


def discriminator_loss(real: Sequence[Judgement], made: Sequence[Judgement]) -> Tensor:
    """Least squares: real towards 1, made towards 0; a mean for each discriminator, summed."""
    return torch.stack(
        [(1 - r.score).square().mean() + m.score.square().mean() for r, m in zip(real, made, strict=True)]
    ).sum()


def adversarial_loss(made: Sequence[Judgement]) -> Tensor:
    """Least squares: made towards 1."""
    return torch.stack([(1 - m.score).square().mean() for m in made]).sum()


def feature_matching_loss(real: Sequence[Judgement], made: Sequence[Judgement]) -> Tensor:
    """Mean absolute difference of each layer of each discriminator, summed."""
    pairs = [pair for r, m in zip(real, made, strict=True) for pair in zip(r.features, m.features, strict=True)]
    return torch.stack([functional.l1_loss(m, r.detach()) for r, m in pairs]).sum()
