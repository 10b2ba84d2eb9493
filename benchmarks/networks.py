"""The networks that the benchmarks measure and reckon with: random weights, nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_echat.nn.echat_model import NetworkConfig
from lightning_echat.nn.speech_adapter import SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig
from lightning_echat.testing import tiny_tokens_config
from lightning_echat.tokens.dialogue_template import TokensConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network by its sizes.

    Attributes:
        llm: Architecture of the language model.
        codebook_size: Of the speech codes.
        encoder: Width, layers, heads, feed-forward width.
        adapter: Layers, heads, feed-forward width.
    """

    llm: dict[str, Any]
    codebook_size: int = 4096
    encoder: tuple[int, int, int, int] = (1024, 24, 16, 4096)
    adapter: tuple[int, int, int] = (4, 4, 2560)


def _qwen2(vocabulary: int, width: int, inner: int, layers: int, heads: int, kv_heads: int, *, tied: bool) -> dict:
    return {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


SIZES = {
    "small": Size(
        llm=_qwen2(8192, 256, 1024, 6, 4, 2, tied=True),
        codebook_size=512,
        encoder=(192, 4, 4, 768),
        adapter=(2, 4, 384),
    ),
    "3b": Size(llm=_qwen2(151_936, 2048, 11_008, 36, 16, 2, tied=True)),
    "7b": Size(llm=_qwen2(152_064, 3584, 18_944, 28, 28, 4, tied=False)),
}
"""3b: experiments/base.yaml. 7b: the same with the sizes of Qwen2.5-7B."""


def network_of(size: Size, *, recompute: bool) -> NetworkConfig:
    """Its config; encoder and language model compute their layers again in backward, or not."""
    width, layers, heads, inner = size.encoder
    adapter_layers, adapter_heads, adapter_inner = size.adapter
    return NetworkConfig(
        encoder=SpeechEncoderConfig(
            pretrained=False, width=width, layers=layers, heads=heads, feedforward=inner, gradient_checkpointing=recompute
        ),
        adapter=SpeechAdapterConfig(layers=adapter_layers, heads=adapter_heads, feedforward=adapter_inner),
        llm=LanguageModelConfig(pretrained=False, architecture=dict(size.llm), gradient_checkpointing=recompute),
    )


def tokens_of(size: Size, folder: Path) -> TokensConfig:
    """Tokens with the vocabulary of that size, and a tokenizer that spells bytes."""
    tiny = tiny_tokens_config(folder)
    return replace(tiny, text_vocabulary_size=size.llm["vocab_size"], codebook_size=size.codebook_size)
