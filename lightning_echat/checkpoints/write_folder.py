"""The project's Hugging Face folder, written: weights, config, tokenizer, prompts, processor and model card.

`nn.model_folder` reads it. It is written beside its place and renamed, so that a folder that is there is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor

from lightning_echat.checkpoints.planned_tensors import PlannedTensor, write_sharded
from lightning_echat.checkpoints.pretrained import EChatPretrainedConfig, EChatPretrainedModel
from lightning_echat.contracts import SAMPLE_RATE, UserError
from lightning_echat.nn.model_folder import PROMPT_SET_NAME, SPEECH_TOKENIZER_NAME
from lightning_echat.tokens.dialogue_template import TokensConfig, load_tokenizer

CARD_NAME = "README.md"
MAX_SHARD_SIZE = "5GB"
_PREFIX = "model."
"""What stands before the network's own names, in a stage's checkpoint and in `EChatPretrainedModel` alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """What a folder is made of.

    Attributes:
        tensors: Name in `EChatModel` -> tensor; each once, whatever its other names.
        tied_weights: Other name -> the name in `tensors`.
        tokens: Templates and ids; its prompt set is the next one.
        prompt_set: Text of the prompt set's file.
        network: As `nn.weights.stored_settings` has it, without LoRA.
        step: Optimizer steps that the weights have been trained for.
        card: Text of the model card.
    """

    tensors: Mapping[str, PlannedTensor]
    tied_weights: Mapping[str, str]
    tokens: TokensConfig
    prompt_set: str
    network: dict[str, Any]
    step: int
    card: str


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when all went well.

    Raises:
        UserError: `out` is there already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; remove it or give another --out")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model_folder(folder: Path, parts: ModelParts, *, max_shard_size: str = MAX_SHARD_SIZE) -> list[str]:
    """Write everything into `folder`.

    Returns:
        Lines about what could not be brought along.
    """
    tokenizer = load_tokenizer(parts.tokens.tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / PROMPT_SET_NAME).write_text(parts.prompt_set, encoding="utf-8")
    tokens = replace(parts.tokens, tokenizer=".", prompt_set=PROMPT_SET_NAME)
    tokens, remarks = _bring_speech_tokenizer(folder, tokens)
    write_sharded(folder, {_PREFIX + name: t for name, t in parts.tensors.items()}, max_shard_size=max_shard_size)
    architecture = parts.network["llm"]["architecture"]
    config = EChatPretrainedConfig(
        architectures=[EChatPretrainedModel.__name__],
        # The widest type of all: loading in it changes no value.
        dtype=max((t.dtype for t in parts.tensors.values()), key=lambda dtype: dtype.itemsize),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int | None, tokenizer.pad_token_id),
        tie_word_embeddings=bool(architecture.get("tie_word_embeddings", False)),
        echat={
            "tokens": asdict(tokens),
            "network": _without_paths(parts.network),
            "tied_weights": {_PREFIX + alias: _PREFIX + name for alias, name in parts.tied_weights.items()},
            "step": parts.step,
        },
    )
    config.save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    # The project's log-mel is Whisper's without its padding to 30 seconds.
    WhisperFeatureExtractor(feature_size=tokens.mel_bins, sampling_rate=SAMPLE_RATE).save_pretrained(folder)
    (folder / CARD_NAME).write_text(parts.card, encoding="utf-8")
    return remarks


def write_generation_config(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """How Hugging Face's own generation ends a turn."""
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _without_paths(network: Mapping[str, Any]) -> dict[str, Any]:
    """The network with names in place of the folders on this machine that its weights once came from."""
    named = {part: network[part]["weights"] for part in ("encoder", "llm")}
    return dict(network) | {
        part: {**network[part], "weights": Path(weights).name if Path(weights).is_dir() else weights}
        for part, weights in named.items()
    }


def _bring_speech_tokenizer(folder: Path, tokens: TokensConfig) -> tuple[TokensConfig, list[str]]:
    """Copy the speech tokenizer, where the model names one that is at hand."""
    if tokens.speech_tokenizer is None:
        return tokens, []
    if not Path(tokens.speech_tokenizer).is_dir():
        remark = f"speech tokenizer {tokens.speech_tokenizer} is not there: give it to echat chat --speech_tokenizer"
        return replace(tokens, speech_tokenizer=None), [remark]
    shutil.copytree(tokens.speech_tokenizer, folder / SPEECH_TOKENIZER_NAME)
    return replace(tokens, speech_tokenizer=SPEECH_TOKENIZER_NAME), []
