"""`echat convert from-reference`: released OSUM-EChat weights into a folder that every command here reads."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoConfig, PreTrainedConfig

from lightning_echat.checkpoints.model_card import SPOKEN, CardFields, write_card
from lightning_echat.checkpoints.planned_tensors import open_tensors
from lightning_echat.checkpoints.reference_layout import (
    HEAD_WIDTH,
    Conversion,
    codebook_size,
    convert,
    infer_network,
    mel_bins,
)
from lightning_echat.checkpoints.reference_prompts import CONFIG_FILE, find_root, read_clone, reference_prompt_set
from lightning_echat.checkpoints.write_folder import ModelParts, new_folder, write_model_folder
from lightning_echat.contracts import UserError
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.tokens.dialogue_template import TokensConfig, load_tokenizer
from lightning_echat.tokens.prompts import prompt_set_file
from lightning_echat.tokens.vocabulary import Vocabulary

PROJECT_PROMPTS = "english"
DEFAULT_LORA_ALPHA = 32.0
"""The released training configuration's."""


def from_reference(
    checkpoint: Path,
    llm: str,
    out: Path,
    *,
    reference_repo: Path | None = None,
    reference_config: Path | None = None,
    encoder_heads: int | None = None,
    lora_alpha: float | None = None,
    card: CardFields | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Convert a released OSUM-EChat checkpoint and print what went where.

    Args:
        checkpoint: .pt or .safetensors file: a state dict, plain or inside DeepSpeed's `module`, with LoRA or without.
        llm: Folder or hub name of the language model that it was built on; config and tokenizer are read, no weights.
        out: The folder to write; it must not be there yet.
        reference_repo: Clone of the reference's repository. Its prompts, which the weights were trained with, are read
            out of it into OUT/prompt_set.yaml. Nothing in it is executed.
        reference_config: The training YAML of the checkpoint; conf/ct_config.yaml of the clone without it.
        encoder_heads: Attention heads of the speech encoder; without it the config's, or else width / 64 as in Whisper.
        lora_alpha: Scale of LoRA updates; without it the config's, or else 32. Their rank is read off the tensors.
        card: What the model card is to say.
        max_shard_size: Weights beyond this size go to several files.
    """
    prompts = _prompts(reference_repo)
    settings = _reference_settings(reference_repo, reference_config)
    llm_config = _llm_config(llm)
    alpha = next(float(a) for a in (lora_alpha, settings.get("lora_alpha"), DEFAULT_LORA_ALPHA) if a is not None)
    tied = bool(getattr(llm_config, "tie_word_embeddings", False))
    conversion = convert(open_tensors(checkpoint), tied=tied, lora_alpha=alpha)
    architecture = json.loads(llm_config.to_json_string(use_diff=False))
    # Where the config was read from, on this machine.
    architecture.pop("_name_or_path", None)
    known_heads = encoder_heads or _config_heads(settings, conversion)
    network = infer_network(conversion, llm_name=llm, architecture=architecture, encoder_heads=known_heads)
    tokens = TokensConfig(
        tokenizer=llm,
        text_vocabulary_size=llm_config.vocab_size,
        codebook_size=codebook_size(conversion),
        audio_strides=(*network.encoder.strides, *network.adapter.strides),
        mel_bins=mel_bins(conversion),
    )
    # A file or a pipe has no width of its own.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    parts = ModelParts(
        tensors=conversion.tensors,
        tied_weights=check_against_model(conversion, network, tokens, console=console),
        tokens=tokens,
        prompt_set=_prompt_set_text(prompts),
        network=asdict(network),
        step=0,
        card=_card(card or CardFields(), checkpoint=checkpoint, llm=llm, out=out),
    )
    with new_folder(out) as folder:
        write_model_folder(folder, parts, max_shard_size=max_shard_size)
    heads = f"{network.encoder.heads} attention heads" + (
        "" if known_heads else f" (width / {HEAD_WIDTH}, as in Whisper: no tensor tells; see --encoder_heads)"
    )
    _print_summary(conversion, out=out, alpha=alpha, heads=heads, prompts=prompts, console=console)


def check_against_model(
    conversion: Conversion, network: NetworkConfig, tokens: TokensConfig, *, console: Console
) -> dict[str, str]:
    """Compare with the network that the sizes make, which exists in outline only.

    Returns:
        The network's names for tensors that share another's: other name -> name.

    Raises:
        UserError: Something is unknown, missing or of another shape; all of it has been listed on the console.
    """
    end_of_text = load_tokenizer(tokens.tokenizer).eos_token_id
    if not isinstance(end_of_text, int):
        raise UserError(f"tokenizer {tokens.tokenizer!r} names no eos_token; give the chat model's tokenizer as --llm")
    vocabulary = Vocabulary(
        text_size=tokens.text_vocabulary_size, codebook_size=tokens.codebook_size, end_of_text=end_of_text
    )
    with torch.device("meta"):
        model = EChatModel(network, tokens=tokens, vocabulary=vocabulary)
    # Tied parameters come up once here and under every name in the state dict.
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            aliases[name] = first[id(parameter)]
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in aliases}
    found = {name: tensor.shape for name, tensor in conversion.tensors.items()}
    problems = {
        "unknown": [
            *conversion.unknown,
            *(f"{name} (from {', '.join(conversion.sources[name])})" for name in found if name not in expected),
        ],
        "missing": [name for name in expected if name not in found],
        "of another shape": [
            f"{name}: {list(found[name])}, not {list(shape)} (from {', '.join(conversion.sources[name])})"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    refuse(problems, console=console)
    return aliases


def refuse(problems: dict[str, list[str]], *, console: Console) -> None:
    """Print every name and raise a `UserError` with the first of each sort; nothing where there are no problems."""
    told = []
    for what, names in problems.items():
        for name in names:
            console.print(f"{what}: {name}", highlight=False, soft_wrap=True, markup=False)
        if names:
            told.append(f"{len(names)} {what} ({names[0]}{', …' if len(names) > 1 else ''})")
    if told:
        raise UserError(
            f"the checkpoint does not fit, all names are listed above: {'; '.join(told)}; "
            f"give the --llm that it was built on, and a released checkpoint"
        )


def _prompt_set_text(prompts: dict[str, Any] | None) -> str:
    if prompts is None:
        return prompt_set_file(PROJECT_PROMPTS).read_text(encoding="utf-8")
    return yaml.safe_dump(prompts, allow_unicode=True, sort_keys=False)


def _prompts(clone: Path | None) -> dict[str, Any] | None:
    if clone is None:
        return None
    if not clone.is_dir():
        raise UserError(f"--reference_repo {clone}: no such folder")
    return reference_prompt_set(read_clone(clone))


def _reference_settings(clone: Path | None, path: Path | None) -> dict[str, Any]:
    """The reference's training configuration, where there is one."""
    if path is None:
        path = find_root(clone) / CONFIG_FILE if clone else None
        if path is None or not path.is_file():
            return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no training configuration: it holds no keys and values")
    return content


def _config_heads(settings: dict[str, Any], conversion: Conversion) -> int | None:
    """Encoder heads by the training configuration, if it is one of this checkpoint."""
    encoder = settings.get("encoder_conf") or {}
    width = encoder.get("output_size")
    weight = conversion.tensors.get("encoder.conv1.weight")
    if width is not None and weight is not None and width != weight.shape[0]:
        raise UserError(
            f"the training configuration is another checkpoint's: its encoder is {width} wide, the tensors "
            f"{weight.shape[0]}; give the right --reference_config"
        )
    return encoder.get("attention_heads")


def _llm_config(llm: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(llm)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of --llm {llm!r}: {str(error).splitlines()[0]}") from error


def _card(fields: CardFields, *, checkpoint: Path, llm: str, out: Path) -> str:
    usage = f"echat chat --checkpoint {out.name} --audio question.wav"
    about = f"{SPOKEN} The weights are those of `{checkpoint.name}`, a released OSUM-EChat checkpoint built on {llm}."
    return write_card(fields, name=out.name, about=about, report=None, usage=usage)


def _print_summary(
    conversion: Conversion, *, out: Path, alpha: float, heads: str, prompts: dict[str, Any] | None, console: Console
) -> None:
    console.print(where_it_went(conversion))
    values = sum(torch.Size(tensor.shape).numel() for tensor in conversion.tensors.values())
    lines = [f"{out}: {len(conversion.tensors)} tensors, {values:,} parameters"]
    lines.append(f"speech encoder: {heads}")
    ranks = {name for names in conversion.sources.values() for name in names if ".lora_" in name}
    if ranks:
        lines.append(f"LoRA: {len(ranks) // 2} updates merged with alpha {alpha:g}")
    if prompts is not None:
        lines.append("prompts: the reference's, read from the clone into prompt_set.yaml")
        if "thinking" not in prompts:
            lines.append("label thinking: this project's own wording; the clone has none in its usual place")
    else:
        lines.append(
            f"prompts: this project's own ({PROJECT_PROMPTS}). The weights were trained with other words, so answers "
            "and losses are worse until the model has been trained with these; --reference_repo CLONE brings theirs"
        )
    lines.append("speech: no speech tokenizer comes with the weights; echat chat answers in text without --out")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def where_it_went(conversion: Conversion) -> Table:
    """A table with a line for each sort of module: released name, ours, shape of its weight, tensors.

    {i} stands for the numbers of layers.
    """
    table = Table("released", "here", "shape", Column("tensors", justify="right"), box=box.SIMPLE)
    for column in table.columns[:2]:
        column.overflow = "fold"
    went: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for ours, names in conversion.sources.items():
        shape = conversion.tensors[ours].shape
        went.setdefault((_modules(names), _module(ours)), []).append(shape)
    for (theirs, ours), shapes in went.items():
        largest = max(shapes, key=lambda shape: torch.Size(shape).numel())
        table.add_row(theirs, ours, " × ".join(map(str, largest)), str(len(shapes)))
    left_out: dict[tuple[str, str], int] = {}
    for name, reason in conversion.dropped.items():
        left_out[_module(name), reason] = left_out.get((_module(name), reason), 0) + 1
    table.add_section()
    for (theirs, reason), count in left_out.items():
        table.add_row(theirs, f"left out: {reason}", "", str(count))
    return table


def _modules(names: Sequence[str]) -> str:
    """Names that become one, for instance query, key and value."""
    return " + ".join(dict.fromkeys(_module(name) for name in names))


def _module(name: str) -> str:
    """A tensor's name without weight or bias, and with its layer's number left open."""
    module = re.sub(r"(?:[._](?:weight|bias|pe))$", "", name)
    return re.sub(r"(?<=layers\.|coders\.)\d+(?=\.)", "{i}", module)
