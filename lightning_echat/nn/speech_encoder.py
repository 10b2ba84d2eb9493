"""Log-mel -> speech frames: Whisper's encoder for speech of any length.

The layers are Hugging Face's own, so Whisper weights load as they are; what differs is that clips keep their length.
Hugging Face's class insists on 30 seconds and ignores masks. Here padding is masked before each convolution and inside
attention, so a clip gives the same frames alone and in any batch.

The strides of the two convolutions are (1, 2) in Whisper, 50 frames a second. A small model trained from nothing does
better on (2, 2), and with a depth-wise convolution in every layer (`depthwise_kernel`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from lightning_echat.contracts import UserError
from lightning_echat.tokens.speech_timing import strided_length


@dataclass(frozen=True, kw_only=True)
class SpeechEncoderConfig:
    """Sizes of the speech encoder, and where its weights come from.

    Attributes:
        weights: Folder or hub name of a Whisper model; read only when `pretrained`.
        pretrained: Load `weights`. False builds the same architecture with random weights.
        width, layers, heads, feedforward: As in Whisper; the defaults are Whisper-medium's.
        dropout: On residuals, feed-forward output and attention weights while training.
        strides: Of the two convolutions.
        depthwise_kernel: Frames of the depth-wise convolution in every layer; 0 for none, as in Whisper.
        max_positions: The most frames after the convolutions: longer speech is refused.
        gradient_checkpointing: Compute each layer again in backward instead of keeping what it computed.
    """

    weights: str = "openai/whisper-medium"
    pretrained: bool = True
    width: int = 1024
    layers: int = 24
    heads: int = 16
    feedforward: int = 4096
    dropout: float = 0.0
    strides: tuple[int, int] = (1, 2)
    depthwise_kernel: int = 0
    max_positions: int = 3000
    gradient_checkpointing: bool = False


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width] Whisper's position code: sines, then cosines, wavelengths from 2π to 10000 · 2π."""
    steps = width // 2
    rates = torch.exp(-math.log(10_000) / (steps - 1) * torch.arange(steps, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[C] lengths -> [C, size] bool, True on valid frames."""
    return torch.arange(size, device=lengths.device)[None] < lengths[:, None]


class DepthwiseConvolution(nn.Module):
    """Pre-norm residual depth-wise convolution over time: each channel sees `kernel` frames around it."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """[C, F, D] frames and [C, F] mask -> [C, F, D]."""
        hidden = self.norm(frames) * mask[..., None]
        # As an image of height 1 the frames lie channels-last without a copy, for which CPUs have a kernel three times
        # as fast as the one for [C, D, F].
        image = hidden.transpose(1, 2)[:, :, None]
        convolution = self.convolution
        hidden = F.conv2d(
            image,
            convolution.weight.unflatten(1, (1, 1)),
            convolution.bias,
            padding=(0, convolution.kernel_size[0] // 2),
            groups=convolution.groups,
        )
        return frames + F.gelu(hidden[:, :, 0].transpose(1, 2))


class SpeechEncoder(nn.Module):
    """Whisper's encoder over clips of their own length."""

    def __init__(self, config: SpeechEncoderConfig, *, mel_bins: int) -> None:
        super().__init__()
        self.config = config
        layer_config = WhisperConfig(
            d_model=config.width,
            encoder_layers=config.layers,
            encoder_attention_heads=config.heads,
            encoder_ffn_dim=config.feedforward,
            num_mel_bins=mel_bins,
            dropout=config.dropout,
            attention_dropout=config.dropout,
        )
        layer_config._attn_implementation = "sdpa"
        first, second = config.strides
        self.conv1 = nn.Conv1d(mel_bins, config.width, kernel_size=3, stride=first, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=second, padding=1)
        self.layers = nn.ModuleList(WhisperEncoderLayer(layer_config) for _ in range(config.layers))
        for layer in self.layers if config.gradient_checkpointing else ():
            # Hugging Face's layers know how; only their own models switch it on.
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        kernel = config.depthwise_kernel
        if kernel and kernel % 2 == 0:
            raise UserError(f"encoder.depthwise_kernel is {kernel}; it must be odd, as a frame stands in its middle")
        self.convolutions = nn.ModuleList(
            DepthwiseConvolution(config.width, kernel) for _ in range(config.layers if kernel else 0)
        )
        self.layer_norm = nn.LayerNorm(config.width)
        self.register_buffer("positions", sinusoids(config.max_positions, config.width), persistent=False)
        self.positions: Tensor

    def load_whisper(self) -> None:
        """Fill in the weights of the Whisper model that the config names; shapes must agree."""
        try:
            whisper = WhisperModel.from_pretrained(self.config.weights, attn_implementation="sdpa")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot load speech encoder {self.config.weights!r}: {reason}") from error
        state = whisper.get_encoder().state_dict()
        state.pop("embed_positions.weight")  # the sinusoids above, bit for bit, but for 1,500 frames only
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            detail = str(error).splitlines()[1].strip()
            raise UserError(
                f"speech encoder {self.config.weights!r} has other sizes than the config: {detail}"
            ) from error
        missing = [name for name in missing if not name.startswith("convolutions.")]
        if missing or unexpected:
            raise UserError(f"speech encoder {self.config.weights!r}: unknown {unexpected[:3]}, missing {missing[:3]}")

    def forward(self, log_mels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            log_mels: [C, F, M].
            lengths: [C] valid frames; what lies behind them has no influence.

        Returns:
            [C, F', D] frames, zero behind each clip's end, and [C] their valid lengths. Cost grows with C · F'².
        """
        hidden = log_mels.transpose(1, 2)
        for convolution in (self.conv1, self.conv2):
            hidden = hidden * length_mask(lengths, hidden.shape[2])[:, None]
            hidden = F.gelu(convolution(hidden))
            lengths = strided_length(lengths, convolution.stride[0])
        frames = hidden.transpose(1, 2)
        if frames.shape[1] > self.config.max_positions:
            raise UserError(
                f"a clip of {frames.shape[1]} encoder frames is longer than encoder.max_positions "
                f"({self.config.max_positions}); raise it or drop such clips with the data's max_seconds"
            )
        mask = length_mask(lengths, frames.shape[1])
        frames = frames + self.positions[: frames.shape[1]].to(frames.dtype)
        frames = F.dropout(frames, self.config.dropout, self.training)
        # [C, 1, 1, F']: broadcast over heads and queries, so no square mask is stored.
        attention_mask = mask[:, None, None, :]
        for index, layer in enumerate(self.layers):
            if self.convolutions:
                frames = self.convolutions[index](frames, mask)
            frames = layer(frames, attention_mask)
        return self.layer_norm(frames) * mask[..., None], lengths
