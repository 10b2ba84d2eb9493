"""Weights on disk: reading a stage's checkpoint, handing it over to the next stage, building its network again.

A folder that `echat convert` wrote stands wherever a checkpoint may. Checkpoints are read with `weights_only=True` and
folders hold safetensors: nothing in either is executed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import pickle
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_echat.contracts import UserError
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig
from lightning_echat.nn.model_folder import is_model_folder, read_model_folder
from lightning_echat.nn.sharded_files import fill_from_sharded, is_sharded, read_sharded, sharded_shapes
from lightning_echat.nn.speech_adapter import SpeechAdapterConfig
from lightning_echat.nn.speech_encoder import SpeechEncoderConfig
from lightning_echat.nn.speech_language_model import LanguageModelConfig, LoRAConfig
from lightning_echat.nn.weight_sources import WeightSource, mapped_weights, without_lora
from lightning_echat.tokens.dialogue_template import DialogueTokenizer, TokensConfig

_PREFIX = "model."
"""Of the network's weights in a stage."""


def latest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest complete one in a run folder or its checkpoints/.

    A checkpoint is a file, a folder where the run was sharded, or one that `echat convert` wrote.
    """
    path = Path(path)
    if path.is_file() or is_sharded(path) or is_model_folder(path):
        return path
    named = [c for folder in (path, path / "checkpoints") for c in folder.glob("*.ckpt")]
    # Folders without their index, and links to what is gone, are no checkpoints.
    found = [c for c in named if c.is_file() or is_sharded(c)]
    if not found:
        raise UserError(
            f"no checkpoint at {path}; give a checkpoint, the folder of a run that has saved one, "
            f"or a folder of echat convert"
        )
    # Lightning writes last-v1.ckpt where an earlier run has left a last.ckpt.
    last = [c for c in found if c.name.startswith("last")]
    return max(last or found, key=lambda c: c.stat().st_mtime_ns)


def checkpoint_hash(path: Path) -> str:
    """SHA-256 of a checkpoint file, or of all files of a folder that is one. Reads all of it."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, whole or sharded, or a converted folder, read without executing anything in it."""
    if path.is_dir():
        return read_model_folder(path) if is_model_folder(path) else read_sharded(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error


def model_weights(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The network's part of a stage checkpoint, under the network's own names."""
    state = {n.removeprefix(_PREFIX): t for n, t in checkpoint.get("state_dict", {}).items() if n.startswith(_PREFIX)}
    _check_some(state, path)
    return state


def _check_some(weights: Sized, path: Path) -> None:
    if not weights:
        raise UserError(f"{path} holds no network weights; was it saved by a stage of this project?")


@dataclass(frozen=True, slots=True)
class HandOver:
    """What came from an earlier stage.

    Attributes:
        report: One line that says so.
        filled: Names of the network's weights that have their values from there.
    """

    report: str
    filled: frozenset[str]


def load_from(model: nn.Module, path: str | Path, *, new_parts: Sequence[str]) -> HandOver:
    """Fill `model` from the checkpoint of an earlier stage. Where it is sharded, each rank reads its part only.

    Args:
        model: The network of this stage.
        path: A checkpoint or a run folder.
        new_parts: Name patterns that this stage adds and the earlier one need not have, for instance "*.lora_*".

    Raises:
        UserError: A weight is missing that `new_parts` does not announce, is unknown, or has another shape.
    """
    path = latest_checkpoint(path)
    source = _source(path)
    own = model.state_dict()
    # LoRA wraps the language model, which renames its weights.
    wrapped = {without_lora(n): n for n in own if ".lora_" not in n}
    stored = {n if n in own else wrapped.get(n, n): n for n in source.shapes}
    missing = [n for n in own if n not in stored and not any(fnmatch.fnmatchcase(n, p) for p in new_parts)]
    unknown = [n for n in stored if n not in own]
    shapes = [n for n in own if n in stored and own[n].shape != source.shapes[stored[n]]]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has another shape for", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"init_from {path} {what} {', '.join(names[:3])}{more}; "
                f"announce parts that this stage adds with init_new_parts, or give the config it was trained with"
            )
    source.fill({name: own[n] for n, name in stored.items()})
    new = sorted(set(own) - set(stored))
    named = f"{', '.join(new[:3])}{f' and {len(new) - 3} more' if len(new) > 3 else ''}" if new else "nothing"
    report = f"init_from: {len(stored)} of {len(own)} weights come from {path}; new in this stage: {named}"
    return HandOver(report, frozenset(stored))


def _source(path: Path) -> WeightSource:
    """The network's weights in a checkpoint, under the network's own names."""
    if is_sharded(path):
        shapes = sharded_shapes(path, prefix=_PREFIX)
        _check_some(shapes, path)
        return WeightSource(shapes, lambda targets: fill_from_sharded(path, targets, prefix=_PREFIX))
    return mapped_weights(model_weights(read_checkpoint(path), path))


@dataclass(slots=True, kw_only=True)
class TrainedModel:
    """A network as a stage left it, ready to answer.

    Attributes:
        model: In eval mode, on the CPU.
        tokenizer: Templates and ids that it was trained with.
        tokens: Their settings.
        path: The checkpoint or converted folder it was read from.
        step: Optimizer steps it had been trained for.
    """

    model: EChatModel
    tokenizer: DialogueTokenizer
    tokens: TokensConfig
    path: Path
    step: int


def stored_settings(tokens: TokensConfig, network: NetworkConfig, model: EChatModel) -> dict[str, Any]:
    """What a checkpoint keeps so that `load_trained` can build the network again, as plain values.

    The language model's architecture is spelled out, so that nobody needs the model it was made from.
    """
    settings = {"tokens": asdict(tokens), "network": asdict(network)}
    settings["network"]["llm"]["architecture"] = json.loads(model.lm.causal_lm.config.to_json_string())
    return settings


def load_trained(path: str | Path) -> TrainedModel:
    """Build the network of a checkpoint or run folder and fill in its weights; no pretrained weights are needed."""
    path = latest_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if "echat" not in checkpoint:
        raise UserError(f"{path} does not say how to build its network; was it saved by a stage of this project?")
    settings = checkpoint["echat"]
    tokens = TokensConfig(**settings["tokens"])
    tokenizer = DialogueTokenizer.from_config(tokens)
    model = EChatModel(network_from_settings(settings["network"]), tokens=tokens, vocabulary=tokenizer.vocabulary)
    model.load_state_dict(model_weights(checkpoint, path), strict=True)
    return TrainedModel(
        model=model.eval(), tokenizer=tokenizer, tokens=tokens, path=path, step=int(checkpoint.get("global_step", 0))
    )


def network_from_settings(settings: dict[str, Any]) -> NetworkConfig:
    """The stored settings as a config that loads nothing pretrained: the checkpoint brings all weights."""
    llm = dict(settings["llm"], pretrained=False)
    llm["lora"] = LoRAConfig(**llm["lora"]) if llm["lora"] else None
    return NetworkConfig(
        encoder=SpeechEncoderConfig(**dict(settings["encoder"], pretrained=False)),
        adapter=SpeechAdapterConfig(**settings["adapter"]),
        llm=LanguageModelConfig(**llm),
        auxiliary_labels=tuple(settings["auxiliary_labels"]),
    )
