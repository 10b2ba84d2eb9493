"""Flow and vocoder as one `Token2Wav`, kept in a folder of its own.

token2wav.json       what it is made of and how it generates
flow.safetensors     weights of the flow, and its prompt and speaker where it has them
vocoder.safetensors  weights of the vocoder, unless that is Griffin-Lim
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_echat.contracts import UserError
from lightning_echat.nn.token2wav.code_encoder import CodeEncoderConfig
from lightning_echat.nn.token2wav.estimator import EstimatorConfig
from lightning_echat.nn.token2wav.flow_matching import FlowConfig, FlowMatching, Prompt, SamplingConfig
from lightning_echat.nn.token2wav.mel import MelConfig
from lightning_echat.nn.token2wav.vocoder import GriffinLimVocoder, HiFiGANVocoder, VocoderConfig

TOKEN2WAV_NAME = "token2wav.json"
SCHEMA = 1
FLOW_WEIGHTS, VOCODER_WEIGHTS = "flow.safetensors", "vocoder.safetensors"
_PEAK = 0.99


class FlowToken2Wav(nn.Module):
    """Codes to a waveform by a flow and a vocoder. It satisfies `interface.Token2Wav`.

    Args:
        flow: Codes to mel.
        vocoder: Mel to waveform, of the same features.
        sampling: How the mel is generated.
        prompt: Speech that every answer continues, and so the voice it has.
        speaker: [speaker_size] embedding of that voice.

    Raises:
        UserError: Flow and vocoder are of other features.
    """

    def __init__(
        self,
        flow: FlowMatching,
        vocoder: HiFiGANVocoder | None = None,
        *,
        sampling: SamplingConfig | None = None,
        prompt: Prompt | None = None,
        speaker: Tensor | None = None,
    ) -> None:
        super().__init__()
        if vocoder is not None and vocoder.config.mel != flow.config.mel:
            raise UserError(
                f"the flow writes {_differences(flow.config.mel, vocoder.config.mel)} and the vocoder reads "
                f"{_differences(vocoder.config.mel, flow.config.mel)}; train both with the same mel"
            )
        self.flow = flow
        self.vocoder = GriffinLimVocoder(flow.config.mel) if vocoder is None else vocoder
        self.sampling = sampling or SamplingConfig()
        self.prompt, self.speaker = prompt, speaker
        self.codebook_size = flow.config.codebook_size
        self.code_rate = flow.config.code_rate
        self.sample_rate = flow.config.mel.sample_rate
        self.eval()

    @torch.no_grad()
    def decode(self, codes: Tensor, *, start: int = 0) -> Tensor:
        """[codes] int64 -> [codes · sample_rate / code_rate] float32, peak at most 0.99. Same codes, same waveform.

        Args:
            codes: All codes of an answer, or a stretch of them.
            start: Codes of the answer that come before. The noise is that of the same place in the whole answer.

        Raises:
            ValueError: The codes are not one-dimensional or not of this codebook.
        """
        if codes.ndim != 1:
            raise ValueError(f"codes must be [codes], not {list(codes.shape)}")
        device = next(self.flow.parameters()).device
        if codes.numel() == 0:
            return torch.zeros(0, device=device)
        if int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size:
            raise ValueError(
                f"codes must be in [0, {self.codebook_size}), not {int(codes.min())} to {int(codes.max())}"
            )
        first = round(start * self.flow.config.mel.samples_per_code(self.code_rate) / self.flow.config.mel.hop)
        mel = self.flow.generate(
            codes.to(device), self.sampling, prompt=self.prompt, speaker=self.speaker, first_frame=first
        )
        samples = int(codes.numel() * self.flow.config.mel.samples_per_code(self.code_rate))
        waveform = self.vocoder(mel[None])[0, :samples].float()
        return waveform / (waveform.abs().max() / _PEAK).clamp_min(1.0)

    def save(self, folder: Path) -> None:
        """Write the weights, then the description: a folder that has a description is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self.prompt is not None:
            tensors |= {"prompt.codes": self.prompt.codes, "prompt.mel": self.prompt.mel}
        if self.speaker is not None:
            tensors["speaker"] = self.speaker
        _write_tensors(folder / FLOW_WEIGHTS, tensors)
        trained = isinstance(self.vocoder, HiFiGANVocoder)
        if trained:
            _write_tensors(folder / VOCODER_WEIGHTS, self.vocoder.state_dict())
        description = {
            "schema": SCHEMA,
            "kind": "flow",
            "flow": asdict(self.flow.config),
            "vocoder": asdict(self.vocoder.config) if isinstance(self.vocoder, HiFiGANVocoder) else "griffin_lim",
            "sampling": asdict(self.sampling),
        }
        temporary = folder / f"{TOKEN2WAV_NAME}.tmp"
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / TOKEN2WAV_NAME)

    @classmethod
    def load(cls, folder: Path) -> FlowToken2Wav:
        """Read what `save` wrote.

        Raises:
            UserError: A file is missing or does not hold what it must.
        """
        try:
            description = json.loads((folder / TOKEN2WAV_NAME).read_text(encoding="utf-8"))
            if description.get("schema") != SCHEMA or description.get("kind") != "flow":
                raise ValueError(f"kind {description.get('kind')!r}, schema {description.get('schema')!r}")
            flow = FlowMatching(flow_config(description["flow"]))
            tensors = load_file(folder / FLOW_WEIGHTS)
            flow.load_state_dict({n.removeprefix("flow."): t for n, t in tensors.items() if n.startswith("flow.")})
            vocoder = None
            if description["vocoder"] != "griffin_lim":
                vocoder = HiFiGANVocoder(vocoder_config(description["vocoder"]))
                vocoder.load_state_dict(load_file(folder / VOCODER_WEIGHTS))
            prompt = None
            if "prompt.codes" in tensors:
                prompt = Prompt(codes=tensors["prompt.codes"], mel=tensors["prompt.mel"])
            return cls(
                flow,
                vocoder,
                sampling=SamplingConfig(**description["sampling"]),
                prompt=prompt,
                speaker=tensors.get("speaker"),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"token2wav {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def flow_config(settings: dict[str, Any]) -> FlowConfig:
    """What `asdict` made of a config, as one again."""
    estimator = dict(settings["estimator"], channels=tuple(settings["estimator"]["channels"]))
    return FlowConfig(
        **{
            **settings,
            "mel": MelConfig(**settings["mel"]),
            "encoder": CodeEncoderConfig(**settings["encoder"]),
            "estimator": EstimatorConfig(**estimator),
        }
    )


def vocoder_config(settings: dict[str, Any]) -> VocoderConfig:
    """What `asdict` made of a config, as one again."""
    lists = {name: tuple(settings[name]) for name in ("rates", "kernels", "block_kernels")}
    dilations = tuple(tuple(entry) for entry in settings["block_dilations"])
    return VocoderConfig(**{**settings, **lists, "mel": MelConfig(**settings["mel"]), "block_dilations": dilations})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _differences(one: MelConfig, other: MelConfig) -> str:
    """The features in which one differs from another."""
    return ", ".join(f"{name} {value}" for name, value in asdict(one).items() if value != getattr(other, name))
