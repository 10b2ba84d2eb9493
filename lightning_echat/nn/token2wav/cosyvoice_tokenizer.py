"""The 25 Hz speech codes of CosyVoice-300M, through the package `s3tokenizer` and weights from the user's folder.

CosyVoice-300M-25Hz ships them as `speech_tokenizer_v1.onnx`. Nothing is downloaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_echat.contracts import SAMPLE_RATE, UserError

WEIGHTS = ("speech_tokenizer_v1.onnx", "speech_tokenizer_v1_25hz.onnx", "speech_tokenizer_v1.pt")
"""Names under which the weights are found, the first that is there."""

_KIND = "speech_tokenizer_v1_25hz"
_HEAD_SIZE = 64
_SAMPLES_PER_CODE = 640


def find_weights(folder: Path) -> Path | None:
    """The file of weights in a folder, None where there is none."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


class CosyVoiceSpeechTokenizer(nn.Module):
    """A `SpeechTokenizer` (see `interface`): codes for a model that speaks like the released one.

    Args:
        model: `s3tokenizer`'s network.
        path: The file that its weights come from.
    """

    def __init__(self, model: Any, *, path: Path) -> None:
        super().__init__()
        self.model = model.eval()
        self.path = path
        self.codebook_size = int(model.quantizer.codebook_size)
        self.code_rate = 25.0
        self.sample_rate = SAMPLE_RATE

    @torch.no_grad()
    def encode(self, waveforms: Tensor, *, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms to codes; n samples give ceil(n / 640) codes, the last one over a tail of silence.

        What is longer than 30 s is read in windows that overlap by 4 s.

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
        import s3tokenizer

        numbers = (lengths.to(waveforms.device) + _SAMPLES_PER_CODE - 1) // _SAMPLES_PER_CODE
        spoken = [row for row in range(len(lengths)) if lengths[row] > 0]
        codes = waveforms.new_zeros(len(lengths), max(numbers.tolist(), default=0), dtype=torch.long)
        if not spoken:
            return codes, numbers
        mels = [s3tokenizer.log_mel_spectrogram(_whole_codes(waveforms[row, : int(lengths[row])])) for row in spoken]
        found, found_lengths = self.model.quantize(*s3tokenizer.padding(mels))
        for place, row in enumerate(spoken):
            number = min(int(numbers[row]), int(found_lengths[place]))
            codes[row, :number] = found[place, :number]
            numbers[row] = number
        return codes, numbers

    def save(self, folder: Path) -> None:
        """Copy the weights: the folder is then another name for this tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{self.path.name}.tmp"
        shutil.copyfile(self.path, temporary)
        temporary.replace(folder / self.path.name)

    @classmethod
    def load(cls, folder: Path) -> CosyVoiceSpeechTokenizer:
        """The tokenizer of a folder that holds one of `WEIGHTS`. The published size takes a few seconds.

        Raises:
            UserError: There are none, the package is missing, or they do not fit.
        """
        path = find_weights(folder)
        if path is None:
            raise UserError(f"{folder} holds none of {', '.join(WEIGHTS)}; copy it from CosyVoice-300M-25Hz")
        try:
            from s3tokenizer.model import ModelConfig, S3Tokenizer
            from s3tokenizer.utils import onnx2torch
        except ImportError as error:
            raise UserError(
                f"{path} is read by the package s3tokenizer, which is not installed ({error}); "
                "pip install 'lightning-echat[cosyvoice]'"
            ) from error
        try:
            if path.suffix == ".onnx":
                state = cast("dict[str, Tensor]", onnx2torch(str(path), cast("str", None), False))
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
            width = state["encoder.conv1.weight"].shape[0]
            layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.blocks."))
            config = ModelConfig(
                n_mels=state["encoder.conv1.weight"].shape[1],
                n_audio_ctx=state["encoder.positional_embedding"].shape[0],
                n_audio_state=width,
                n_audio_head=width // _HEAD_SIZE,
                n_audio_layer=layers,
                n_codebook_size=state["quantizer._codebook.embed"].shape[0],
            )
            model = S3Tokenizer(_KIND, config)
            model.load_state_dict(state, strict=True)
        # Whatever a damaged file makes of onnx's parser or of the names that the package expects.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path} holds no 25 Hz speech tokenizer of CosyVoice-300M: {reason}") from error
        return cls(model, path=path)


def _whole_codes(waveform: Tensor) -> Tensor:
    """Silence at the end, so that every code has its four frames."""
    return functional.pad(waveform, (0, -waveform.numel() % _SAMPLES_PER_CODE))
