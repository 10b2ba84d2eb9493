"""Whisper's log-mel spectrogram."""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from lightning_echat.contracts import SAMPLE_RATE

WINDOW = 400
HOP = 160
_FLOOR = 1e-10
_DYNAMIC_RANGE = 8.0
"""Decades kept below the loudest bin of an utterance. Only the floor moves with the utterance: the level itself stays,
since loudness tells emotions apart."""


class LogMel:
    """Waveform -> log-mel frames, 100 a second. Window and filters are built once.

    Costs about 0.6 ms a 3 s clip on one core.
    """

    def __init__(self, *, mel_bins: int = 80) -> None:
        self.mel_bins = mel_bins
        self._window = torch.hann_window(WINDOW)
        filters = melscale_fbanks(
            n_freqs=WINDOW // 2 + 1,
            f_min=0.0,
            f_max=SAMPLE_RATE / 2,
            n_mels=mel_bins,
            sample_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self._filters = filters.T.contiguous()

    def __call__(self, waveform: Tensor) -> Tensor:
        """[samples] float32 at `SAMPLE_RATE`, at least half a window -> [samples // HOP, mel_bins] float32."""
        spectrum = torch.stft(waveform, WINDOW, HOP, window=self._window, center=True, return_complex=True)
        # The last frame is centred on the end of the signal; Whisper drops it.
        spectrum = spectrum[:, :-1]
        # Several times faster than abs() or a sum over the pair.
        power = spectrum.real.square() + spectrum.imag.square()
        mel = (self._filters @ power).clamp_(min=_FLOOR).log10_()
        mel = mel.clamp_(min=float(mel.max()) - _DYNAMIC_RANGE).add_(4.0).div_(4.0)
        return mel.T.contiguous()
