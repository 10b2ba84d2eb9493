"""Predictors of how people would rate speech. They know nothing of its text; their weights are the user's own files.

Torchmetrics' implementations look for weights in a folder that is a constant of their module, and download what is
missing there. Both are kept from it here: the folder is the user's, and what it lacks is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from lightning_echat.contracts import UserError

_RATE = 16_000
"""Hz. Of DNSMOS and of scripted predictors."""


class _FromFolder:
    """A predictor of torchmetrics whose weights lie in the user's folder.

    Args:
        folder: Holds `files`; nothing is downloaded.

    Raises:
        UserError: A file or a package is missing.
    """

    label: str
    source: str
    files: tuple[str, ...]
    packages: tuple[str, ...]
    names: tuple[str, ...]

    def __init__(self, folder: Path) -> None:
        missing = [name for name in self.files if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{self.label} needs {folder / missing[0]}; copy it from {self.source}")
        try:
            for package in self.packages:
                __import__(package)
        except ImportError as error:
            raise UserError(f"{self.label}: {error}; pip install 'lightning-echat[quality]'") from error
        self._folder = folder

    def __call__(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> dict[str, float]:
        """The means of what is predicted, by `names`, on a scale of 1 to 5; NaN without any waveform."""
        try:
            scores = [self._score(waveform, sample_rate).tolist() for waveform in waveforms]
        # Whatever a damaged file makes of the parsers, and speech that is too short or long for the network.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.label} with the weights of {self._folder}: {reason}") from error
        return {name: _mean([score[i] for score in scores]) for i, name in enumerate(self.names)}

    def _score(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """[samples] -> [names]."""
        raise NotImplementedError


class DNSMOS(_FromFolder):
    """Microsoft's DNSMOS: `p808`, `signal`, `background`, `overall`."""

    label, source = "DNSMOS", "the repository of the DNS challenge"
    files = ("DNSMOS/model_v8.onnx", "DNSMOS/sig_bak_ovr.onnx")
    packages = ("librosa", "onnxruntime", "requests")
    names = ("p808", "signal", "background", "overall")

    def _score(self, waveform: Tensor, sample_rate: int) -> Tensor:
        from torchmetrics.functional.audio import dnsmos as implementation

        implementation.DNSMOS_DIR = str(self._folder.resolve())
        rate = implementation.deep_noise_suppression_mean_opinion_score
        return rate(resample(waveform, sample_rate, _RATE), _RATE, personalized=False)


class NISQA(_FromFolder):
    """NISQA 2.0 (Mittag et al. 2021): `overall`, `noisiness`, `discontinuity`, `coloration`, `loudness`, 5 is best."""

    label, source = "NISQA", "weights/ of the repository gabrielmittag/NISQA"
    files = ("nisqa.tar",)
    packages = ("librosa", "requests")
    names = ("overall", "noisiness", "discontinuity", "coloration", "loudness")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from torchmetrics.functional.audio import nisqa as implementation

        # It keeps what it has loaded, whatever the folder.
        implementation._load_nisqa_model.cache_clear()

    def _score(self, waveform: Tensor, sample_rate: int) -> Tensor:
        from torchmetrics.functional.audio import nisqa as implementation

        implementation.NISQA_DIR = str(self._folder.resolve())
        return implementation.non_intrusive_speech_quality_assessment(waveform, sample_rate)


class ScriptedPredictor:
    """Any predictor of a mean opinion score that was saved as TorchScript, UTMOS for one (docs/token2wav.md).

    Args:
        path: A module that takes [1, samples] float32 at 16 kHz and gives one number.

    Raises:
        UserError: It is no TorchScript.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._module = torch.jit.load(path, map_location="cpu").eval()
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"mos_model {path}: {reason}; give a module saved by torch.jit.save") from error
        self.path = path

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[Tensor], *, sample_rate: int) -> float:
        """Mean of what is predicted, NaN without any waveform."""
        scores = []
        for waveform in waveforms:
            try:
                score = self._module(resample(waveform, sample_rate, _RATE)[None])
                scores.append(float(score))
            except (RuntimeError, TypeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise UserError(
                    f"mos_model {self.path} does not turn [1, samples] at 16 kHz into one number: {reason}"
                ) from error
        return _mean(scores)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
