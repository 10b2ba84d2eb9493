"""Where every tensor of a released OSUM-EChat checkpoint goes in `EChatModel`, and which sizes the tensors tell.

The released layout is wenet's encoder, an adapter of convolutions and a small transformer, a Hugging Face language
model under `llama_model`, perhaps wrapped by PEFT, and a speech embedding and head. Some tensors stand there twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_echat.checkpoints.planned_tensors import PlannedTensor, merge_lora
from lightning_echat.contracts import UserError
from lightning_echat.nn.echat_model import NetworkConfig
from lightning_echat.nn.speech_adapter import SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig

ADAPTER_HEADS = 4
"""Attention heads of the released adapter: a constant of its code, in no tensor and no config."""
HEAD_WIDTH = 64
"""Width of an attention head in every Whisper encoder."""

_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"encoder\.embed\.conv\.0\.", "encoder.conv1."),
        (r"encoder\.embed\.conv\.2\.", "encoder.conv2."),
        (r"encoder\.encoders\.(\d+)\.self_attn\.linear_([qkv]|out)\.", r"encoder.layers.\1.self_attn.\2_proj."),
        (r"encoder\.encoders\.(\d+)\.feed_forward\.w_([12])\.", r"encoder.layers.\1.fc\2."),
        (r"encoder\.encoders\.(\d+)\.norm1\.", r"encoder.layers.\1.self_attn_layer_norm."),
        (r"encoder\.encoders\.(\d+)\.norm2\.", r"encoder.layers.\1.final_layer_norm."),
        (r"encoder\.after_norm\.", "encoder.layer_norm."),
        (r"down_sample_2\.conv\.1\.", "adapter.convolutions.0."),
        (r"down_sample_2\.conv\.4\.", "adapter.convolutions.1."),
        (r"down_sample_2\.conv\.7\.", "adapter.convolutions.2."),
        (r"speech_transformer\.embed\.out\.([01])\.", r"adapter.embed.\1."),
        (r"speech_transformer\.encoders\.(\d+)\.self_attn\.linear_[qkv]\.", r"adapter.layers.\1.self_attn.in_proj_"),
        (r"speech_transformer\.encoders\.(\d+)\.self_attn\.linear_out\.", r"adapter.layers.\1.self_attn.out_proj."),
        (r"speech_transformer\.encoders\.(\d+)\.feed_forward\.w_([12])\.", r"adapter.layers.\1.linear\2."),
        (r"speech_transformer\.encoders\.(\d+)\.norm([12])\.", r"adapter.layers.\1.norm\2."),
        (r"speech_transformer\.after_norm\.", "adapter.norm."),
        (r"speech_llama_proj\.", "adapter.projection."),
        (r"llama_model\.", "lm.llm."),
        (r"speech_token_emded\.", "lm.speech_embedding."),
        (r"speech_head\.", "lm.speech_head."),
    )
)
_EMBEDDING, _HEAD = "llama_model.model.embed_tokens.weight", "llama_model.lm_head.weight"
_ALIASES = {
    "embed_tokens.weight": _EMBEDDING,
    "lm_head.weight": _HEAD,
    "llama_model.speech_token_emded.weight": "speech_token_emded.weight",
    "llama_model.speech_head.weight": "speech_head.weight",
    "llama_model.speech_head.bias": "speech_head.bias",
}
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.(?:\w+\.)?weight")


@dataclass(slots=True, kw_only=True)
class Conversion:
    """What becomes of a released checkpoint.

    Attributes:
        tensors: Name in `EChatModel` -> what will stand there.
        sources: Name in `EChatModel` -> the released names that it comes from.
        dropped: Released name -> why it is left out.
        unknown: Released names that nothing is known about.
    """

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def convert(released: Mapping[str, Tensor], *, tied: bool, lora_alpha: float) -> Conversion:
    """Plan where the tensors of a released checkpoint go; nothing is computed yet but the comparison of doubles.

    Args:
        released: Name -> tensor; a `module.` before every name is ignored.
        tied: Whether the language model scores with its embedding, so that its head is the embedding again.
        lora_alpha: Numerator of the scale of low-rank updates; their rank is their own size.

    Raises:
        UserError: Two names of one tensor hold different values, or half of a low-rank update is missing.
    """
    conversion = Conversion()
    tensors = {_plain_name(name): tensor for name, tensor in released.items()}
    lora = {name: tensors.pop(name) for name in list(tensors) if _LORA.fullmatch(name)}
    _drop_doubles(tensors, {**_ALIASES, **({_HEAD: _EMBEDDING} if tied else {})}, conversion)
    planned = _merge(tensors, lora, lora_alpha)
    for name in sorted(planned):
        if name.endswith(".pos_enc.pe"):
            conversion.dropped[name] = "positions, which are computed"
        elif name.startswith("ln_speech."):
            conversion.dropped[name] = "never used by the released code"
        elif (ours := _our_name(name)) is None:
            conversion.unknown.append(name)
        else:
            conversion.sources.setdefault(ours, []).append(name)
    for ours, names in conversion.sources.items():
        # Query, key and value are one matrix here, in this order.
        parts = [planned[name] for name in sorted(names, key=lambda n: "qkv".find(_projection(n)))]
        conversion.tensors[ours] = parts[0] if len(parts) == 1 else PlannedTensor.joined(parts)
    for name in lora:
        if ours := _our_name(f"{name.partition('.lora_')[0]}.weight"):
            conversion.sources[ours].append(name)
    return conversion


def _plain_name(name: str) -> str:
    """The name without what training frameworks and PEFT wrap around it."""
    name = name.removeprefix("module.").replace("llama_model.base_model.model.", "llama_model.", 1)
    return name.replace(".base_layer.", ".")


def _our_name(name: str) -> str | None:
    for pattern, ours in _RENAMES:
        if match := pattern.match(name):
            return match.expand(ours) + name[match.end() :]
    return None


def _projection(name: str) -> str:
    found = re.search(r"linear_([qkv])\.", name)
    return found[1] if found else ""


def _drop_doubles(tensors: dict[str, Tensor], aliases: Mapping[str, str], conversion: Conversion) -> None:
    """Leave one name of each tensor that has several. A file may hold any one of them alone."""
    # An alias of an alias is resolved in turn, as lm_head -> llama_model.lm_head -> embedding.
    for alias, name in aliases.items():
        if alias not in tensors:
            continue
        tensor = tensors.pop(alias)
        kept = tensors.setdefault(name, tensor)
        if kept.shape != tensor.shape or not _equal(kept, tensor):
            raise UserError(
                f"{alias} and {name} should be one tensor but hold different values; "
                f"give an --llm whose tie_word_embeddings fits, or mend the checkpoint"
            )
        conversion.dropped[alias] = f"the same as {name}"


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() or torch.equal(left.to(right.dtype), right)


def _merge(tensors: Mapping[str, Tensor], lora: Mapping[str, Tensor], alpha: float) -> dict[str, PlannedTensor]:
    planned = {name: PlannedTensor.of(tensor) for name, tensor in tensors.items()}
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora.items():
        match = _LORA.fullmatch(name)
        assert match is not None
        halves.setdefault(f"{match['layer']}.weight", {})[match["part"]] = tensor
    for name, parts in halves.items():
        if set(parts) != {"A", "B"} or name not in planned:
            lacking = name if name not in planned else f"lora_{'B' if 'A' in parts else 'A'} of it"
            raise UserError(f"low-rank update of {name}: the checkpoint lacks {lacking}")
        planned[name] = merge_lora(planned[name], parts["A"], parts["B"], alpha=alpha)
    return planned


def infer_network(
    conversion: Conversion, *, llm_name: str, architecture: dict[str, object], encoder_heads: int | None
) -> NetworkConfig:
    """The sizes of the network, read off the tensors.

    Args:
        conversion: With the tensors.
        llm_name: Name of the language model.
        architecture: Its config.
        encoder_heads: Where they are not `HEAD_WIDTH` wide, which no tensor tells.

    Raises:
        UserError: A tensor that tells a size is missing, or the heads do not divide the width.
    """
    width = _shape(conversion, "encoder.conv1.weight")[0]
    heads = encoder_heads or max(1, width // HEAD_WIDTH)
    if width % heads:
        raise UserError(f"encoder_heads {heads} do not divide the encoder's width {width}")
    return NetworkConfig(
        encoder=SpeechEncoderConfig(
            pretrained=False,
            width=width,
            layers=_layers(conversion.tensors, "encoder.layers."),
            heads=heads,
            feedforward=_shape(conversion, "encoder.layers.0.fc1.weight")[0],
            strides=(1, 2),
        ),
        adapter=SpeechAdapterConfig(
            strides=(1, 2, 2),
            layers=_layers(conversion.tensors, "adapter.layers."),
            heads=ADAPTER_HEADS,
            feedforward=_shape(conversion, "adapter.layers.0.linear1.weight")[0],
        ),
        llm=LanguageModelConfig(
            weights=llm_name, pretrained=False, architecture=dict(architecture), rotary_bfloat16=True
        ),
    )


def mel_bins(conversion: Conversion) -> int:
    """Mel bins that the encoder reads."""
    return _shape(conversion, "encoder.conv1.weight")[1]


def codebook_size(conversion: Conversion) -> int:
    """Speech codes: the classes of the speech head without the boundary."""
    return _shape(conversion, "lm.speech_head.weight")[0] - 1


def _layers(names: Iterable[str], prefix: str) -> int:
    found = [int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix)]
    return max(found, default=-1) + 1


def _shape(conversion: Conversion, name: str) -> tuple[int, ...]:
    if name not in conversion.tensors:
        unknown = f"; unknown in it: {', '.join(conversion.unknown[:3])}" if conversion.unknown else ""
        raise UserError(f"the checkpoint lacks {name}{unknown}; is it a released OSUM-EChat checkpoint?")
    return conversion.tensors[name].shape
