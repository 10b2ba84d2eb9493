"""Speech codes to log-mel by conditional flow matching (Lipman et al. 2023), on the straight way of optimal transport.

Training draws a point between noise and the mel and learns which way leads from one to the other; generation goes that
way from noise in a few Euler steps. Conditions are the codes, a speaker embedding, and the mel of a prompt that the
result continues. Now and then training drops them all, so that generation can be guided away from what fits without
them (classifier-free guidance).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.code_encoder import CodeEncoder, CodeEncoderConfig
from lightning_echat.nn.token2wav.estimator import Estimator, EstimatorConfig
from lightning_echat.nn.token2wav.mel import MelConfig

_SIGMA = 1e-6
"""What is left of the noise at the end of the way."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Codes to mel. The defaults are those of CosyVoice-300M-25Hz.

    Attributes:
        codebook_size, code_rate: Of the codes; codes a second.
        mel: What it writes.
        mel_mean, mel_scale: The network sees (mel - mean) / scale.
        speaker_size: Of the speaker embedding; 0 for one voice that needs none.
        encoder, estimator: Sizes.
        predicts: What the estimator writes: the velocity, as in the released weights, or the mel at the end of the way,
            from which the velocity follows. A velocity holds all of the noise, which few channels cannot carry; a mel
            holds none (Li & He 2025).
        condition_dropout: Share of training rows that see no condition.
        prompt_share: Share of training rows that see a beginning of their mel, as a prompt.
        longest_prompt: Of a row, at most.
    """

    codebook_size: int = 4096
    code_rate: float = 25.0
    mel: MelConfig = field(default_factory=MelConfig)
    mel_mean: float = 0.0
    mel_scale: float = 1.0
    speaker_size: int = 192
    encoder: CodeEncoderConfig = field(default_factory=CodeEncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    predicts: Literal["velocity", "mel"] = "velocity"
    condition_dropout: float = 0.2
    prompt_share: float = 0.5
    longest_prompt: float = 0.3

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("condition_dropout", "prompt_share", "longest_prompt")}
        if wrong := next((name for name, share in shares.items() if not 0 <= share < 1), None):
            raise UserError(f"flow: {wrong} must be in [0, 1), not {shares[wrong]}")
        if self.codebook_size < 1 or self.code_rate <= 0 or self.mel_scale <= 0 or self.speaker_size < 0:
            raise UserError("flow: codebook_size, code_rate and mel_scale must be positive, speaker_size 0 or more")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a mel is generated.

    Attributes:
        steps: Euler steps; each runs the estimator once, on twice the rows where there is guidance.
        schedule: "cosine" takes small steps first, where the way still turns.
        guidance: 0 for none.
        temperature: Scale of the noise.
        seed: Of the noise. The same seed and input give the same mel.
    """

    steps: int = 10
    schedule: Literal["cosine", "linear"] = "cosine"
    guidance: float = 0.7
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0 or self.temperature < 0:
            raise UserError("sampling: steps must be at least 1, guidance and temperature at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Speech that a generated mel continues.

    Attributes:
        codes: [n] int64.
        mel: [F, bins] float32.
    """

    codes: Tensor
    mel: Tensor


def frame_noise(frames: int, bins: int, *, seed: int, first: int = 0, stream: int = 0) -> Tensor:
    """[frames, bins] float32 of a normal distribution. A frame has the same noise whichever frames it is drawn with.

    A counter-based generator on the CPU (Philox, Salmon et al. 2011) makes them, so that a stretch of an answer has the
    noise of the same place in the whole, at the cost of the stretch, and a seed means the same on every device.

    Args:
        frames: How many.
        bins: Values a frame.
        seed: Of all frames.
        first: Number of the first.
        stream: Another one is other noise under the same seed.
    """
    # A step of the counter makes four numbers of 64 bits; Box and Muller turn two into two.
    steps = -(-bins // 4)
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    source = np.random.Philox(key=key, counter=[first * steps, 0, 0, 0])
    uniform = (source.random_raw(frames * steps * 4).reshape(frames, 2, 2 * steps) >> np.uint64(11)) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log1p(-uniform[:, 0])), 2.0 * np.pi * uniform[:, 1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :bins]
    return torch.from_numpy(normal.astype(np.float32))


class FlowMatching(nn.Module):
    """Codes to log-mel."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        bins = config.mel.bins
        self.encoder = CodeEncoder(config.encoder, codebook_size=config.codebook_size, bins=bins)
        self.speaker = nn.Linear(config.speaker_size, bins) if config.speaker_size else None
        conditions = 3 if config.speaker_size else 2
        self.estimator = Estimator(config.estimator, inputs=(1 + conditions) * bins, outputs=bins)

    def loss_sum(
        self,
        codes: Tensor,
        code_lengths: Tensor,
        mels: Tensor,
        mel_lengths: Tensor,
        *,
        speakers: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Squared error of what the estimator writes, summed over valid mel values, and how many those are.

        Args:
            codes: [B, n] int64.
            code_lengths: [B] int64.
            mels: [B, F, bins] float32.
            mel_lengths: [B] int64.
            speakers: [B, speaker_size], where the flow takes them; without, and where one is 0, as if it were dropped.
            generator: Draws noise, times, prompts and drops; torch's own without.
        """
        target = (mels - self.config.mel_mean) / self.config.mel_scale
        valid = torch.arange(mels.shape[1], device=mels.device) < mel_lengths[:, None]
        encoded = self.encoder(codes, code_lengths, mel_lengths, frames=mels.shape[1])
        rows = mels.shape[0]

        def draw() -> Tensor:
            return torch.rand(rows, device=mels.device, generator=generator)

        prompted = draw() < self.config.prompt_share
        prompt_frames = draw() * self.config.longest_prompt * mel_lengths * prompted
        in_prompt = torch.arange(mels.shape[1], device=mels.device) < prompt_frames[:, None]
        kept = (draw() >= self.config.condition_dropout)[:, None, None].to(mels.dtype)
        conditions = [part * kept for part in self._conditions(encoded, target * in_prompt[..., None], speakers)]
        noise = torch.randn(target.shape, device=mels.device, generator=generator)
        time = draw()
        at = time[:, None, None]
        point = (1 - (1 - _SIGMA) * at) * noise + at * target
        wanted = target if self.config.predicts == "mel" else target - (1 - _SIGMA) * noise
        found = self.estimator(torch.cat([point, *conditions], dim=-1).transpose(1, 2), time, valid).transpose(1, 2)
        error = (found - wanted).float().square() * valid[..., None]
        return error.sum(), valid.sum() * mels.shape[-1]

    @torch.no_grad()
    def generate(
        self,
        codes: Tensor,
        config: SamplingConfig,
        *,
        prompt: Prompt | None = None,
        speaker: Tensor | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """The mel of one utterance.

        Args:
            codes: [n] int64, at least one.
            config: See there.
            prompt: What the result continues.
            speaker: [speaker_size].
            first_frame: Where the result stands in the answer that it is a stretch of; the noise is of that place.

        Returns:
            [F, bins] float32, the frames that cover the codes, without the prompt's.
        """
        frames = self.config.mel.frames(codes.numel(), code_rate=self.config.code_rate)
        before = prompt.mel.shape[0] if prompt else 0
        encoded = self._encode(codes, frames, prompt)
        known = encoded.new_zeros(encoded.shape)
        if prompt:
            known[0, :before] = (prompt.mel.to(encoded) - self.config.mel_mean) / self.config.mel_scale
        conditions = torch.cat(self._conditions(encoded, known, None if speaker is None else speaker[None]), dim=-1)
        bins = self.config.mel.bins
        noise = torch.cat(
            [
                frame_noise(before, bins, seed=config.seed, stream=1),
                frame_noise(frames, bins, seed=config.seed, first=first_frame),
            ]
        )
        mel = self._follow((noise[None] * config.temperature).to(encoded), conditions, config)[0, before:]
        return (mel * self.config.mel_scale + self.config.mel_mean).float()

    def _encode(self, codes: Tensor, frames: int, prompt: Prompt | None) -> Tensor:
        """[1, F, bins], the prompt's frames first. They are stretched apart, so that the border stays where it is."""
        together = torch.cat([prompt.codes.to(codes), codes]) if prompt else codes
        before = prompt.mel.shape[0] if prompt else 0
        return self.encoder.of_parts(
            together[None], parts=[(prompt.codes.numel(), before)] if prompt else [], rest=frames
        )

    def _conditions(self, encoded: Tensor, known: Tensor, speakers: Tensor | None) -> list[Tensor]:
        """What the estimator is given beside the noisy mel, each [B, F, bins]."""
        if self.speaker is None:
            if speakers is not None:
                raise ValueError("this flow was made without speaker embeddings (speaker_size 0)")
            return [encoded, known]
        if speakers is None:
            # Part of the graph all the same, or DDP would wait for its gradient.
            speakers = encoded.new_zeros(encoded.shape[0], self.speaker.in_features)
        given = speakers.any(-1, keepdim=True).to(encoded.dtype)
        said = given * self.speaker(functional.normalize(speakers.to(encoded), dim=-1))
        return [encoded, said[:, None].expand_as(encoded), known]

    def _follow(self, mel: Tensor, conditions: Tensor, config: SamplingConfig) -> Tensor:
        """[1, F, bins] of noise -> the end of the way."""
        times = torch.linspace(0, 1, config.steps + 1, device=mel.device)
        if config.schedule == "cosine":
            times = 1 - torch.cos(times * (math.pi / 2))
        if config.guidance:
            conditions = torch.cat([conditions, torch.zeros_like(conditions)])
        for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
            rows = torch.cat([mel.expand(conditions.shape[0], -1, -1), conditions], dim=-1).transpose(1, 2)
            found = self.estimator(rows, mel.new_full((rows.shape[0],), start), None).transpose(1, 2)
            if config.guidance:
                found = (1 + config.guidance) * found[:1] - config.guidance * found[1:]
            if self.config.predicts == "mel":
                found = (found - mel) / (1 - start)
            mel = mel + (end - start) * found
        return mel
