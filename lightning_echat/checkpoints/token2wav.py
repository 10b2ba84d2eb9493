"""`echat convert token2wav`: a trained flow and a trained vocoder as one folder that speaks."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from rich.console import Console

from lightning_echat.checkpoints.cosyvoice_flow import FLOW_NAME, read_released_flow
from lightning_echat.contracts import UserError
from lightning_echat.data.decoding import decode_waveform
from lightning_echat.nn.token2wav.flow_matching import FlowMatching, Prompt, SamplingConfig
from lightning_echat.nn.token2wav.interface import load_speech_tokenizer
from lightning_echat.nn.token2wav.mel import LogMelSpectrogram
from lightning_echat.nn.token2wav.synthesizer import FlowToken2Wav
from lightning_echat.nn.token2wav.trained_parts import read_part
from lightning_echat.nn.token2wav.vocoder import HiFiGANVocoder


def token2wav(
    flow: Path,
    out: Path,
    *,
    vocoder: Path | None = None,
    sampling: SamplingConfig | None = None,
    prompt: Path | None = None,
    speech_tokenizer: Path | None = None,
) -> None:
    """Join flow and vocoder into a folder for --token2wav of chat, evaluate and the callbacks.

    Args:
        flow: Checkpoint or run folder of the flow, a token2wav folder, or the released CosyVoice-300M-25Hz.
        out: Folder to write.
        vocoder: The same of the vocoder; without it the folder speaks by Griffin-Lim.
        sampling: How the mel is generated; stored.
        prompt: Wav file whose voice and manner every answer continues; a few seconds.
        speech_tokenizer: Folder of the speech tokenizer, to make codes of the prompt.
    """
    trained = _flow(flow)
    voice = None if vocoder is None else cast(HiFiGANVocoder, read_part(vocoder, name="vocoder"))
    spoken = None if prompt is None else _prompt(prompt, speech_tokenizer, trained)
    FlowToken2Wav(trained, voice, sampling=sampling, prompt=spoken).save(out)
    by = "Griffin-Lim" if voice is None else f"a vocoder of {_millions(voice)}"
    Console().print(f"{out}: a flow of {_millions(trained)} and {by}", highlight=False, markup=False, soft_wrap=True)


def _flow(path: Path) -> FlowMatching:
    if path.name == FLOW_NAME or (path / FLOW_NAME).is_file():
        return read_released_flow(path)
    return cast(FlowMatching, read_part(path, name="flow"))


def _prompt(path: Path, speech_tokenizer: Path | None, flow: FlowMatching) -> Prompt:
    """Codes and mel of a recording."""
    if speech_tokenizer is None:
        raise UserError("--prompt needs --speech_tokenizer, the folder of what made the codes of the training data")
    tokenizer, config = load_speech_tokenizer(speech_tokenizer), flow.config
    if tokenizer.codebook_size != config.codebook_size:
        raise UserError(
            f"{speech_tokenizer} has {tokenizer.codebook_size} codes, the flow was trained on {config.codebook_size}"
        )
    if not path.is_file():
        raise UserError(f"no prompt {str(path)!r}")
    content = path.read_bytes()
    heard = decode_waveform(content, sample_rate=tokenizer.sample_rate)
    codes, lengths = tokenizer.encode(heard[None], lengths=torch.tensor([heard.numel()]))
    mel = LogMelSpectrogram(config.mel)(decode_waveform(content, sample_rate=config.mel.sample_rate)[None])[0]
    return Prompt(codes=codes[0, : int(lengths[0])], mel=mel)


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters"
