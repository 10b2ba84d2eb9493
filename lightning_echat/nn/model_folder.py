"""The project's Hugging Face folder, read: `config.json` says how to build the network, safetensors hold its weights.

`echat convert` writes such folders (`checkpoints.write_folder`), and whatever reads a stage's checkpoint reads them as
well: they come out in the same form. Everything that a folder needs lies inside it, so it can be moved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_echat.contracts import MODEL_TYPE, UserError

CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME = "config.json", "model.safetensors", "model.safetensors.index.json"
PROMPT_SET_NAME, SPEECH_TOKENIZER_NAME = "prompt_set.yaml", "speech_tokenizer"
_PATHS = ("tokenizer", "prompt_set", "speech_tokenizer")
"""Settings of the tokens that are paths; in the folder they are relative to it."""


def is_model_folder(path: Path) -> bool:
    """Whether `path` is a folder in the Hugging Face layout, of this project or another."""
    return any((path / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder.

    Raises:
        UserError: The index is damaged, or names a file that is missing or lies elsewhere.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    names = sorted(set(_read_json(folder / INDEX_NAME).get("weight_map", {}).values()))
    if bad := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise UserError(f"{folder / INDEX_NAME} names {bad[0]!r}, which is not in the folder; copy all of its files")
    return [folder / name for name in names]


def read_model_folder(folder: Path) -> dict[str, Any]:
    """A folder as a stage's checkpoint: `state_dict`, `echat` with the paths of its own files, and `global_step`.

    Weights are mapped, not read, until somebody looks at them.

    Raises:
        UserError: It is another model's, or cannot be read.
    """
    config = _read_json(folder / CONFIG_NAME)
    if config.get("model_type") != MODEL_TYPE or "echat" not in config:
        raise UserError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not one of this project (echat convert)"
        )
    settings = config["echat"]
    tokens = dict(settings["tokens"])
    tokens.update({key: str(folder / tokens[key]) for key in _PATHS if tokens.get(key) is not None})
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
    for alias, name in settings.get("tied_weights", {}).items():
        if name in state:
            state[alias] = state[name]
    return {
        "state_dict": state,
        "echat": {"tokens": tokens, "network": settings["network"]},
        "global_step": settings.get("step", 0),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object")
    return content
