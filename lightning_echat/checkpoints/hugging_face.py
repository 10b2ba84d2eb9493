"""`echat convert to-hf` and `from-hf`: a stage's weights as a Hugging Face folder, and a stage that starts from one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor
from transformers import AutoConfig

from lightning_echat.checkpoints.model_card import SPOKEN, CardFields, write_card
from lightning_echat.checkpoints.planned_tensors import PlannedTensor, merge_lora, write_sharded
from lightning_echat.checkpoints.write_folder import (
    CARD_NAME,
    MAX_SHARD_SIZE,
    ModelParts,
    new_folder,
    write_generation_config,
    write_model_folder,
)
from lightning_echat.contracts import UserError
from lightning_echat.nn.weights import latest_checkpoint, model_weights, read_checkpoint
from lightning_echat.tokens.dialogue_template import TokensConfig, load_tokenizer
from lightning_echat.tokens.prompts import prompt_set_file

_LLM = "lm.llm."
_PEFT = "lm.llm.base_model.model."
_ALONE = "The language model of a spoken dialogue model, without what hears and speaks."
_NOT_FOR_A_STAGE = ("gradient_checkpointing", "lora")
"""Settings of the language model that are the next stage's own choice."""


def to_hf(
    checkpoint: Path,
    out: Path | None = None,
    *,
    part: Literal["all", "llm"] = "all",
    report: Path | None = None,
    card: CardFields | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write a checkpoint as a Hugging Face folder; LoRA updates are merged into the weights.

    Args:
        checkpoint: A .ckpt file, the folder of a run, or a converted folder.
        out: The folder to write; `huggingface` beside the checkpoint without it. It must not be there yet.
        part: The whole model, or the language model alone as plain `transformers` loads it, without any speech.
        report: report.json of `echat evaluate`, for the model card; the run folder's own without it.
        card: What the model card is to say.
        max_shard_size: Weights beyond this size go to several files.
    """
    path = latest_checkpoint(checkpoint)
    stored = read_checkpoint(path)
    if "echat" not in stored:
        raise UserError(f"{path} does not say how to build its network; was it saved by a stage of this project?")
    settings = stored["echat"]
    tensors, aliases = distinct(_without_lora(model_weights(stored, path), settings["network"]["llm"].get("lora")))
    step = int(stored.get("global_step", 0))
    home = checkpoint if checkpoint.is_dir() else checkpoint.parent
    out = out or home / "huggingface"
    own_report = home / "report.json"
    card_text = write_card(
        card or CardFields(),
        name=out.resolve().name,
        about=f"{SPOKEN if part == 'all' else _ALONE} Its last training took {step} optimizer steps.",
        # What was measured of the whole is no score of its language model.
        report=report or (own_report if part == "all" and own_report.is_file() else None),
        usage=_usage(part, out.name),
        spoken=part == "all",
    )
    tokens = TokensConfig(**settings["tokens"])
    parts = ModelParts(
        tensors=tensors,
        tied_weights=aliases,
        tokens=tokens,
        prompt_set=prompt_set_file(tokens.prompt_set).read_text(encoding="utf-8"),
        network={**settings["network"], "llm": {**settings["network"]["llm"], "lora": None}},
        step=step,
        card=card_text,
    )
    write = write_llm_folder if part == "llm" else write_model_folder
    with new_folder(out) as folder:
        remarks = write(folder, parts, max_shard_size=max_shard_size)
    sys.stdout.write("\n".join([f"{out}: {'language model' if part == 'llm' else 'model'} of {path}", *remarks]) + "\n")


def from_hf(folder: Path, out: Path) -> None:
    """Write the YAML that starts a stage from a converted folder: its tokens, its sizes, and `init_from`.

    Give it to `echat fit` after the experiment, whose sizes it replaces:
    `echat fit --config experiments/base.yaml --config experiments/empathy.yaml --config OUT`.

    Args:
        folder: Written by `echat convert from-reference` or `to-hf`.
        out: The YAML file to write.
    """
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: give a .yaml file")
    path = latest_checkpoint(folder)
    if not path.is_dir():
        raise UserError(f"{folder} is no converted folder but holds a checkpoint; give it as init_from, or use to-hf")
    # Absolute, as the YAML may be used from anywhere.
    settings = read_checkpoint(path.resolve())["echat"]
    network = settings["network"]
    llm = {key: value for key, value in network["llm"].items() if key not in _NOT_FOR_A_STAGE}
    init_args = {
        "tokens": settings["tokens"],
        "network": {
            **network,
            "encoder": {**network["encoder"], "pretrained": False},
            "llm": {**llm, "pretrained": False},
        },
        "init_from": str(path.resolve()),
    }
    text = yaml.safe_dump({"model": {"init_args": _plain(init_args)}}, allow_unicode=True, sort_keys=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(f"# Starts a stage from {path.resolve()}.\n{text}", encoding="utf-8")
    partial.replace(out)
    sys.stdout.write(f"{out}: give it after the experiment's own files, echat fit --config … --config {out}\n")


def write_llm_folder(folder: Path, parts: ModelParts, *, max_shard_size: str) -> list[str]:
    """Write the language model alone: what `AutoModelForCausalLM.from_pretrained` reads.

    Returns:
        What stays behind, in words.
    """
    architecture = dict(parts.network["llm"]["architecture"])
    tensors = {name.removeprefix(_LLM): t for name, t in parts.tensors.items() if name.startswith(_LLM)}
    config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    config.dtype = max((t.dtype for t in tensors.values()), key=lambda dtype: dtype.itemsize)
    tokenizer = load_tokenizer(parts.tokens.tokenizer)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_generation_config(folder, tokenizer)
    write_sharded(folder, tensors, max_shard_size=max_shard_size)
    (folder / CARD_NAME).write_text(parts.card, encoding="utf-8")
    remarks = [f"left behind: {len(parts.tensors) - len(tensors)} tensors of speech encoder, adapter and speech codes"]
    if parts.network["llm"].get("rotary_bfloat16"):
        remarks.append("transformers keeps rotary positions in float32, so its losses differ from these by up to 4e-4")
    return remarks


def distinct(planned: Mapping[str, PlannedTensor | Tensor]) -> tuple[dict[str, PlannedTensor], dict[str, str]]:
    """Each tensor under its first name, and other name -> first name where a tensor has several.

    A model names its embedding before the head that shares it, which is the name that Hugging Face keeps too.
    """
    kept: dict[str, PlannedTensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in planned.items():
        if isinstance(tensor, PlannedTensor):
            kept[name] = tensor
            continue
        # Names of one parameter share memory, in a model and in a file of torch.save alike.
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        kept[name] = PlannedTensor.of(tensor)
    return kept, aliases


def _without_lora(state: Mapping[str, Tensor], lora: dict[str, Any] | None) -> dict[str, PlannedTensor | Tensor]:
    """Weights under the names that they have without PEFT, low-rank updates merged."""
    if lora is None:
        return dict(state)
    plain: dict[str, PlannedTensor | Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        ours = name.replace(_PEFT, _LLM, 1).replace(".base_layer.", ".")
        layer = name.removesuffix(".base_layer.weight")
        down, up = (state.get(f"{layer}.lora_{half}.default.weight") for half in "AB")
        if down is None or up is None:
            plain[ours] = tensor
        else:
            plain[ours] = merge_lora(PlannedTensor.of(tensor), down, up, alpha=float(lora["alpha"]))
    return plain


def _usage(part: str, name: str) -> str:
    if part == "llm":
        return f'from transformers import AutoModelForCausalLM\n\nAutoModelForCausalLM.from_pretrained("{name}")'
    return (
        "from lightning_echat.checkpoints.pretrained import EChatPretrainedModel\n\n"
        f'model = EChatPretrainedModel.from_pretrained("{name}").model\n\n'
        f"# on the command line\n# echat chat --checkpoint {name} --audio question.wav --out answer.wav"
    )


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
