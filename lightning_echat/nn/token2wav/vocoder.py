"""Log-mel to waveform: HiFi-GAN (Kong et al. 2020), or Griffin-Lim where nothing has been trained yet.

The generator is transformers' `SpeechT5HifiGan`, which is HiFi-GAN's with free sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchaudio.functional import griffinlim, melscale_fbanks
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.mel import MelConfig

_GRIFFIN_LIM_STEPS, _MOMENTUM = 32, 0.99


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """Mel to waveform. The defaults are HiFi-GAN V1 at the features of CosyVoice-300M.

    Attributes:
        mel: What it reads.
        channels: Before the first upsampling; each halves them.
        rates: Of the upsamplings; their product is the hop of the mel.
        kernels: Of the upsamplings, each larger than its rate by an even number.
        block_kernels, block_dilations: Of the residual blocks after each upsampling, which run side by side.
    """

    mel: MelConfig = field(default_factory=MelConfig)
    channels: int = 512
    rates: tuple[int, ...] = (8, 8, 2, 2)
    kernels: tuple[int, ...] = (16, 16, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    def __post_init__(self) -> None:
        if math.prod(self.rates) != self.mel.hop:
            raise UserError(f"vocoder: the product of rates {list(self.rates)} must be the mel's hop, {self.mel.hop}")
        if len(self.kernels) != len(self.rates) or len(self.block_dilations) != len(self.block_kernels):
            raise UserError("vocoder: give one kernel for each rate and one tuple of dilations for each block kernel")
        if any(kernel < rate or (kernel - rate) % 2 for kernel, rate in zip(self.kernels, self.rates, strict=True)):
            raise UserError("vocoder: each kernel must be its rate plus an even number, or lengths would not fit")
        if self.channels % 2 ** len(self.rates):
            raise UserError(f"vocoder: channels {self.channels} must be divisible by 2 for each of the rates")


class HiFiGANVocoder(nn.Module):
    """[B, F, bins] log-mel -> [B, F · hop] float32 in (-1, 1)."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=config.mel.bins,
                sampling_rate=config.mel.sample_rate,
                upsample_initial_channel=config.channels,
                upsample_rates=list(config.rates),
                upsample_kernel_sizes=list(config.kernels),
                resblock_kernel_sizes=list(config.block_kernels),
                resblock_dilation_sizes=[list(dilations) for dilations in config.block_dilations],
                normalize_before=False,
            )
        )
        self.generator.apply_weight_norm()

    def forward(self, mels: Tensor) -> Tensor:
        """See the class."""
        return self.generator(mels)


class GriffinLimVocoder(nn.Module):
    """The same without training: magnitudes by the pseudo-inverse of the mel filters, phases by Griffin-Lim.

    It draws no random numbers.
    """

    _inverse: Tensor
    _window: Tensor

    def __init__(self, mel: MelConfig) -> None:
        super().__init__()
        self.mel = mel
        filters = melscale_fbanks(
            mel.fft // 2 + 1, mel.low, mel.high, mel.bins, mel.sample_rate, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("_inverse", torch.linalg.pinv(filters), persistent=False)
        self.register_buffer("_window", torch.hann_window(mel.window), persistent=False)

    def forward(self, mels: Tensor) -> Tensor:
        """[B, F, bins] -> [B, F · hop]."""
        magnitudes = (mels.exp() @ self._inverse).clamp_min(0.0)
        # F + 1 centred frames make F · hop samples. Ours are centred half a hop later, and so is what comes back.
        magnitudes = torch.cat([magnitudes, magnitudes[:, -1:]], dim=1).transpose(1, 2)
        return griffinlim(
            magnitudes,
            window=self._window,
            n_fft=self.mel.fft,
            hop_length=self.mel.hop,
            win_length=self.mel.window,
            power=1.0,
            n_iter=_GRIFFIN_LIM_STEPS,
            momentum=_MOMENTUM,
            length=mels.shape[1] * self.mel.hop,
            rand_init=False,
        )
