"""Where weights are read from: files of which each rank reads the part that it keeps, and nothing else.

All are read without executing anything in them: safetensors, checkpoints with `weights_only=True`, and the folders of
sharded runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lightning_echat.contracts import UserError
from lightning_echat.nn.deferred_init import fill_part
from lightning_echat.nn.echat_model import EChatModel, NetworkConfig


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Weights by name, not yet read.

    Attributes:
        shapes: Of all of them.
        fill: Copies those that are named into tensors, of which this rank may hold a part: that is what is read.
    """

    shapes: Mapping[str, torch.Size]
    fill: Callable[[Mapping[str, Tensor]], None]


def mapped_weights(state: Mapping[str, Tensor]) -> WeightSource:
    """Tensors that are mapped from a file: pages nobody looks at are not read."""

    def fill(targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            fill_part(target, state[name])

    return WeightSource({name: tensor.shape for name, tensor in state.items()}, fill)


def safetensors_weights(files: Iterable[Path]) -> WeightSource:
    """All weights of some safetensors files.

    Raises:
        UserError: One cannot be read.
    """
    shapes: dict[str, torch.Size] = {}
    homes: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    shapes[name], homes[name] = torch.Size(opened.get_slice(name).get_shape()), file
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"cannot read {file}: {error}") from error

    def fill(targets: Mapping[str, Tensor]) -> None:
        for file in dict.fromkeys(homes[name] for name in targets):
            with safe_open(file, "pt") as opened:
                for name, target in targets.items():
                    if homes[name] == file:
                        scalar = not shapes[name]
                        fill_part(target, opened.get_tensor(name) if scalar else opened.get_slice(name))

    return WeightSource(shapes, fill)


def read_pretrained(model: EChatModel, network: NetworkConfig) -> set[str]:
    """Fill in the speech encoder and the language model that the config names.

    Returns:
        Names of the parameters that have their values now.

    Raises:
        UserError: There are no safetensors, or a weight is missing in them or has another shape.
    """
    names = [name for name, _ in model.named_parameters()]
    filled: set[str] = set()
    if network.encoder.pretrained:
        own = {
            n.removeprefix("encoder."): n for n in names if n.startswith("encoder.") and ".convolutions." not in f".{n}"
        }
        filled |= _read(model, own, network.encoder.weights, "speech encoder", prefixes=("model.encoder.", "encoder."))
    if network.llm.pretrained:
        own = {
            without_lora(n).removeprefix("lm.llm."): n for n in names if n.startswith("lm.llm.") and ".lora_" not in n
        }
        prefix = f"{model.lm.causal_lm.base_model_prefix}."
        own_base = {name.removeprefix(prefix): n for name, n in own.items()}
        filled |= _read(model, own, network.llm.weights, "language model", prefixes=("",), otherwise=own_base)
    return filled


def without_lora(name: str) -> str:
    """The name that a weight has in a language model without LoRA."""
    return name.replace("lm.llm.base_model.model.", "lm.llm.").replace(".base_layer.", ".")


def _read(
    model: nn.Module,
    own: dict[str, str],
    weights: str,
    what: str,
    *,
    prefixes: tuple[str, ...],
    otherwise: dict[str, str] | None = None,
) -> set[str]:
    """Fill parameters from a Hugging Face model.

    Args:
        model: The network.
        own: Name in the files, behind one of `prefixes` -> name in the network.
        weights: Folder or hub name.
        what: What it is, for messages.
        prefixes: Of the names in the files; the first that occurs.
        otherwise: In place of `own` where that matches nothing: the files of a model without its head.
    """
    source = safetensors_weights(_pretrained_files(weights, what))
    candidates = [{f"{p}{name}": n for name, n in own.items()} for p in prefixes] + ([otherwise] if otherwise else [])
    stored = max(candidates, key=lambda candidate: len(candidate.keys() & source.shapes.keys()))
    parameters = dict(model.named_parameters())
    if missing := [name for name in stored if name not in source.shapes]:
        raise UserError(f"{what} {weights!r} lacks {missing[0]} ({len(missing)} of {len(stored)} weights are missing)")
    for name, n in stored.items():
        if source.shapes[name] != parameters[n].shape:
            shapes = f"{tuple(source.shapes[name])}, not {tuple(parameters[n].shape)}"
            raise UserError(f"{what} {weights!r} has other sizes than the config: {name} is {shapes}")
    source.fill({name: parameters[n] for name, n in stored.items()})
    return set(stored.values())


def _pretrained_files(weights: str, what: str) -> list[Path]:
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    try:
        if whole := cached_file(weights, SAFE_WEIGHTS_NAME, **options):
            return [Path(whole)]
        if index := cached_file(weights, SAFE_WEIGHTS_INDEX_NAME, **options):
            files, _ = get_checkpoint_shard_files(weights, index)
            return [Path(file) for file in files]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {what} {weights!r}: {str(error).splitlines()[0]}") from error
    raise UserError(
        f"cannot load {what} {weights!r} shard by shard: it has no {SAFE_WEIGHTS_NAME}; save it as safetensors, "
        f"or train with another strategy"
    )
