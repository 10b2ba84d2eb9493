"""Log-mel features of token-to-speech: what the flow writes and the vocoder reads.

They are HiFi-GAN's, which CosyVoice shares, and not those of the speech encoder: another rate, natural logarithms of
magnitudes, and a floor that does not move with the utterance.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.transforms import MelSpectrogram

from lightning_echat.contracts import UserError

_FLOOR = 1e-5


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """Log-mel features. The defaults are those of CosyVoice-300M.

    Attributes:
        sample_rate: Hz of the waveform.
        fft, window, hop: Samples.
        bins: Mel bands.
        low, high: Hz.
    """

    sample_rate: int = 22_050
    fft: int = 1024
    window: int = 1024
    hop: int = 256
    bins: int = 80
    low: float = 0.0
    high: float = 8000.0

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.window <= self.fft or (self.fft - self.hop) % 2:
            raise UserError(
                f"mel: hop {self.hop} <= window {self.window} <= fft {self.fft} must hold, and fft - hop be even"
            )
        if not 0 <= self.low < self.high <= self.sample_rate / 2:
            raise UserError(f"mel: 0 <= low {self.low} < high {self.high} <= half of {self.sample_rate} Hz must hold")

    def frames(self, codes: int, *, code_rate: float) -> int:
        """Frames that cover so many codes; the last one may reach beyond their end."""
        return -int(-codes * self.samples_per_code(code_rate) // self.hop)

    def samples_per_code(self, code_rate: float) -> Fraction:
        """Samples of one code, exactly."""
        return Fraction(self.sample_rate) / Fraction(code_rate)


class LogMelSpectrogram(nn.Module):
    """[B, samples] float32 -> [B, samples // hop, bins] float32: natural logarithms, at least log(1e-5)."""

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        self._mel = MelSpectrogram(
            sample_rate=config.sample_rate,
            n_fft=config.fft,
            win_length=config.window,
            hop_length=config.hop,
            f_min=config.low,
            f_max=config.high,
            n_mels=config.bins,
            power=1.0,
            center=False,
            norm="slaney",
            mel_scale="slaney",
        )
        # Made of the config, so that no checkpoint need hold them.
        for name, buffer in list(self._mel.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            self._mel.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            waveforms: Each must be longer than half of what `fft` exceeds `hop` by.
            lengths: [B] valid samples, where they differ: the frames of each are then those it has alone.
        """
        edge = (self.config.fft - self.config.hop) // 2
        # Reflected, so that a frame is centred on its hop and all of them are within the waveform.
        padded = functional.pad(waveforms[:, None], (edge, edge), mode="reflect")[:, 0]
        if lengths is not None:
            place = torch.arange(padded.shape[1], device=padded.device)
            last = (edge + lengths - 1)[:, None]
            padded = padded.gather(1, torch.where(place > last, 2 * last - place, place).clamp_min(0))
        return torch.log(self._mel(padded).transpose(1, 2).clamp_min(_FLOOR))
