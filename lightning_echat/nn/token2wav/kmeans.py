"""Speech codes that need no download: k-means over log-mel blocks, and Griffin-Lim for the way back.

Waveform -> log-mel, 100 frames a second -> 4 frames in one block, 25 a second -> number of the nearest centroid.
Back: centroid -> 4 mel frames -> smoothed over time -> magnitudes -> phases by Griffin-Lim. Nothing here is trained by
gradients and nothing draws random numbers except `fit_kmeans`.

Centroids are means of logarithms, so what comes back is quieter than what went in: about 5 dB with 256 codes. There is
no gain against that, since these means are what is nearest in the log spectrum.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import griffinlim, melscale_fbanks

from lightning_echat.contracts import SAMPLE_RATE, UserError

CONFIG_NAME, CODEBOOK_NAME = "speech_tokenizer.json", "codebook.safetensors"

SCHEMA = 1
CODE_RATE = 25.0
HOP = 160
FRAMES_PER_CODE = 4
SAMPLES_PER_CODE = HOP * FRAMES_PER_CODE
MEL_BINS = 80
_FFT = 1024
_WINDOW = 640
"""A window of 40 ms: resynthesis is closer to the original than with 64 ms (mel -> waveform: 1.5 against 2.4 dB)."""
_FLOOR = 1e-4
"""Smallest mel magnitude told apart, about 80 dB below loud speech. 1e-5 fits as well (5.96 against 5.98 dB)."""
_GRIFFIN_LIM_STEPS, _MOMENTUM = 32, 0.99
_PEAK = 0.99
_KMEANS_STEPS = 20

_FEATURES = {
    "sample_rate": SAMPLE_RATE,
    "code_rate": CODE_RATE,
    "fft": _FFT,
    "window": _WINDOW,
    "hop": HOP,
    "mel_bins": MEL_BINS,
    "floor": _FLOOR,
}
"""What the centroids mean. It stands in the saved file: a codebook of other features is refused, not misread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """How a codebook came about.

    Attributes:
        blocks: Blocks (codes) it was fitted on.
        perplexity: exp of the entropy of code use on these; `codebook_size` when all are used alike.
        dead: Centroids that ended without a block and were moved onto the worst represented ones.
        seed: What chose the first centroids.
    """

    blocks: int
    perplexity: float
    dead: int
    seed: int


class KMeansSpeechTokenizer(nn.Module):
    """Both a `SpeechTokenizer` and a `Token2Wav` (see `interface`).

    Args:
        codebook: [K, FRAMES_PER_CODE * MEL_BINS] float32 centroids: natural logarithms of mel magnitudes.
        report: How it was fitted.

    Raises:
        ValueError: The codebook has another shape or holds what is not finite.
    """

    codebook: Tensor
    _filters: Tensor
    _inverse_filters: Tensor
    _window: Tensor

    def __init__(self, codebook: Tensor, *, report: FitReport) -> None:
        super().__init__()
        if codebook.ndim != 2 or codebook.shape[0] < 1 or codebook.shape[1] != FRAMES_PER_CODE * MEL_BINS:
            expected = FRAMES_PER_CODE * MEL_BINS
            raise ValueError(f"a codebook is [codes, {expected}], not {list(codebook.shape)}")
        if not torch.isfinite(codebook).all():
            raise ValueError("the codebook holds values that are not finite")
        self.report = report
        self.codebook_size = codebook.shape[0]
        self.code_rate = CODE_RATE
        self.sample_rate = SAMPLE_RATE
        filters = _mel_filters()
        self.register_buffer("codebook", codebook.float().contiguous())
        self.register_buffer("_filters", filters, persistent=False)
        # [mel, bins]: the smallest spectrum that has the given mels; its negative bins are clamped in `decode`.
        self.register_buffer("_inverse_filters", torch.linalg.pinv(filters), persistent=False)
        self.register_buffer("_window", torch.hann_window(_WINDOW), persistent=False)

    @torch.no_grad()
    def encode(self, waveforms: Tensor, *, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms to codes; n samples give ceil(n / 640) codes, the last one over a tail of silence.

        A waveform gives the same codes in any batch (but for exact ties in float arithmetic): what stands after its
        end is not looked at.

        Args:
            waveforms: [B, samples] float32 in [-1, 1] at 16 kHz.
            lengths: [B] valid samples, 0 allowed.

        Returns:
            [B, codes] int64, 0 after the end, and [B] int64 codes.
        """
        if waveforms.ndim != 2 or lengths.shape != waveforms.shape[:1]:
            raise ValueError(
                f"waveforms {list(waveforms.shape)} and lengths {list(lengths.shape)} must be [B, n] and [B]"
            )
        lengths = lengths.to(waveforms.device)
        code_lengths = count_codes(lengths)
        codes = self._nearest(_log_mel_blocks(waveforms, lengths, window=self._window, filters=self._filters))
        valid = torch.arange(codes.shape[1], device=codes.device) < code_lengths[:, None]
        return codes.masked_fill(~valid, 0), code_lengths

    @torch.no_grad()
    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        """[codes] int64 -> [codes · 640] float32 at 16 kHz, peak at most 0.99; equal codes give equal waveforms.

        It draws nothing, so `start` changes nothing.

        Raises:
            ValueError: The codes are not one-dimensional or not of this codebook.
        """
        if codes.ndim != 1:
            raise ValueError(f"codes must be [codes], not {list(codes.shape)}")
        if codes.numel() == 0:
            return self.codebook.new_zeros(0)
        if int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size:
            raise ValueError(
                f"codes must be in [0, {self.codebook_size}), not {int(codes.min())} to {int(codes.max())}"
            )
        mel = _smooth(self.codebook[codes].reshape(-1, MEL_BINS)).exp()
        magnitudes = (mel @ self._inverse_filters).clamp_min(0.0)
        # F + 1 centred frames make F · hop samples, so the last frame is said twice.
        magnitudes = torch.cat([magnitudes, magnitudes[-1:]]).T
        waveform = griffinlim(
            magnitudes,
            window=self._window,
            n_fft=_FFT,
            hop_length=HOP,
            win_length=_WINDOW,
            power=1.0,
            n_iter=_GRIFFIN_LIM_STEPS,
            momentum=_MOMENTUM,
            length=codes.numel() * SAMPLES_PER_CODE,
            # Phases from 0 come as close as random ones (1.50 dB either way) and need no generator.
            rand_init=False,
        )
        return waveform / (waveform.abs().max() / _PEAK).clamp_min(1.0)

    def _nearest(self, blocks: Tensor) -> Tensor:
        """[B, codes, block] -> [B, codes]: |x - c|² without |x|², which is the same for all centroids."""
        return (self.codebook.square().sum(1) - 2.0 * (blocks @ self.codebook.T)).argmin(-1)

    def save(self, folder: Path) -> None:
        """Write the codebook, then the description: a folder that has a description is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{CODEBOOK_NAME}.tmp"
        save_file({"codebook": self.codebook.cpu()}, temporary)
        temporary.replace(folder / CODEBOOK_NAME)
        config = {
            "schema": SCHEMA,
            "kind": "kmeans",
            "codebook_size": self.codebook_size,
            "features": _FEATURES,
            "fit": asdict(self.report),
        }
        temporary = folder / f"{CONFIG_NAME}.tmp"
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / CONFIG_NAME)

    @classmethod
    def load(cls, folder: Path) -> KMeansSpeechTokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: A file is missing or does not hold what it must.
        """
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            size, report = _check_config(config)
            tensors = load_file(folder / CODEBOOK_NAME)
            if set(tensors) != {"codebook"}:
                raise ValueError(f"{CODEBOOK_NAME} holds {sorted(tensors)}, not just the codebook")
            codebook = tensors["codebook"]
            if codebook.dtype != torch.float32 or codebook.shape[:1] != (size,):
                raise ValueError(
                    f"the codebook is {codebook.dtype} {list(codebook.shape)}, not float32 with {size} rows"
                )
            return cls(codebook, report=report)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"speech tokenizer {folder} cannot be loaded: {error}") from error


def count_codes(samples: Tensor) -> Tensor:
    """Codes of waveforms of so many samples: a block that has begun counts."""
    return (samples + SAMPLES_PER_CODE - 1) // SAMPLES_PER_CODE


def log_mel_blocks(waveform: Tensor) -> Tensor:
    """[samples] float32 at 16 kHz -> [ceil(samples / 640), FRAMES_PER_CODE * MEL_BINS], what a fit takes."""
    lengths = torch.tensor([waveform.numel()], device=waveform.device)
    filters, window = _mel_filters().to(waveform.device), torch.hann_window(_WINDOW, device=waveform.device)
    return _log_mel_blocks(waveform[None], lengths, window=window, filters=filters)[0]


def fit_kmeans(blocks: Tensor, *, codebook_size: int, seed: int = 0) -> KMeansSpeechTokenizer:
    """Fit a codebook. Twenty thousand blocks (13 minutes) and 256 codes take a second or two of one core.

    Args:
        blocks: [n, FRAMES_PER_CODE * MEL_BINS] from `log_mel_blocks`.
        codebook_size: Number of codes.
        seed: Chooses the first centroids; the same blocks and seed give the same codebook.

    Raises:
        UserError: There are fewer distinct blocks than codes.
    """
    points = blocks.cpu().float().numpy()
    distinct = np.unique(points, axis=0)
    if codebook_size < 1 or len(distinct) < codebook_size:
        raise UserError(
            f"codebook_size must be from 1 to {len(distinct)}, the distinct blocks of speech, not {codebook_size}"
        )
    # Distinct, since digital silence repeats itself exactly. (scipy's own "++" start takes minutes at this size.)
    first = np.random.default_rng(seed).choice(distinct, codebook_size, replace=False)
    with warnings.catch_warnings():
        # "One of the clusters is empty": mended below.
        warnings.filterwarnings("ignore", category=UserWarning)
        centroids, nearest = kmeans2(points, first, iter=_KMEANS_STEPS, minit="matrix", missing="warn")
    centroids, dead = _revive(points, centroids, nearest)
    tokenizer = KMeansSpeechTokenizer(
        torch.from_numpy(centroids),
        report=FitReport(blocks=len(points), perplexity=0.0, dead=dead, seed=seed),
    )
    used = torch.bincount(tokenizer._nearest(torch.from_numpy(points)), minlength=codebook_size).double() / len(points)
    perplexity = float(torch.special.entr(used).sum().exp())
    tokenizer.report = FitReport(blocks=len(points), perplexity=round(perplexity, 1), dead=dead, seed=seed)
    return tokenizer


def _revive(
    points: NDArray[np.float32], centroids: NDArray[np.float32], nearest: NDArray[np.int32]
) -> tuple[NDArray[np.float32], int]:
    """Move centroids that no point is nearest to onto the points that are worst represented. Returns their number."""
    dead = np.flatnonzero(np.bincount(nearest, minlength=len(centroids)) == 0)
    distances = np.square(points - centroids[nearest]).sum(axis=1)
    revived = centroids.copy()
    revived[dead] = points[np.argsort(-distances, kind="stable")[: len(dead)]]
    return revived, len(dead)


def _mel_filters() -> Tensor:
    """[bins, mel] triangles of Slaney's scale."""
    return melscale_fbanks(
        _FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, MEL_BINS, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )


def _log_mel_blocks(waveforms: Tensor, lengths: Tensor, *, window: Tensor, filters: Tensor) -> Tensor:
    """[B, samples] and [B] -> [B, codes, block]. Levels are absolute: loudness is part of what a code says."""
    samples = int(count_codes(torch.tensor(waveforms.shape[1]))) * SAMPLES_PER_CODE
    if samples == 0:
        return waveforms.new_zeros(len(waveforms), 0, FRAMES_PER_CODE * MEL_BINS)
    beyond = torch.arange(waveforms.shape[1], device=waveforms.device) >= lengths[:, None]
    padded = functional.pad(waveforms.float().masked_fill(beyond, 0.0), (0, samples - waveforms.shape[1]))
    # Zeros around, not a mirror image: the end then looks alike in every batch.
    spectrum = torch.stft(padded, _FFT, HOP, _WINDOW, window, center=True, pad_mode="constant", return_complex=True)[
        ..., :-1
    ]
    mel = spectrum.abs().transpose(1, 2) @ filters
    return mel.clamp_min(_FLOOR).log().reshape(len(waveforms), -1, FRAMES_PER_CODE * MEL_BINS)


def _smooth(log_mel: Tensor) -> Tensor:
    """[F, mel] -> the same, each frame mixed with its neighbours (1, 2, 1): blocks then join without steps."""
    padded = torch.cat([log_mel[:1], log_mel, log_mel[-1:]])
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]


def _check_config(config: dict[str, Any]) -> tuple[int, FitReport]:
    """Codebook size and report of a saved description; ValueError where it is of another kind or version."""
    expected = {"schema", "kind", "codebook_size", "features", "fit"}
    if set(config) != expected:
        raise ValueError(f"{CONFIG_NAME} holds {sorted(config)}, not {sorted(expected)}")
    if config["schema"] != SCHEMA or config["kind"] != "kmeans":
        raise ValueError(f"schema {config['schema']!r} of kind {config['kind']!r}, not {SCHEMA} of 'kmeans'")
    if config["features"] != _FEATURES:
        raise ValueError(f"its features are {config['features']}, this version computes {_FEATURES}; fit it again")
    return int(config["codebook_size"]), FitReport(**config["fit"])
