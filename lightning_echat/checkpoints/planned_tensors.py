"""Tensors that are to be written, computed one at a time: converting takes the memory of the largest of them.

What is read stays mapped from its file until it is copied out, and what is written goes to the file at once.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.nn.model_folder import INDEX_NAME, is_model_folder, weight_files

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NESTED_UNDER = ("module", "state_dict")
"""Where training frameworks put the weights inside a checkpoint: DeepSpeed, Lightning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor whose shape and type are known before it exists.

    Attributes:
        shape, dtype: What `make` yields.
        make: Computes or reads it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> PlannedTensor:
        """A tensor that exists, or is mapped from a file."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, make=lambda: tensor)

    @classmethod
    def joined(cls, parts: list[PlannedTensor]) -> PlannedTensor:
        """Parts one after the other along their first dimension."""
        rows = sum(part.shape[0] for part in parts)
        return cls(
            shape=(rows, *parts[0].shape[1:]),
            dtype=parts[0].dtype,
            make=lambda: torch.cat([part.make() for part in parts]),
        )

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def merge_lora(weight: PlannedTensor, down: Tensor, up: Tensor, *, alpha: float) -> PlannedTensor:
    """A weight with its low-rank update: W + alpha / r · up · down, computed in float32, in the type of W.

    Args:
        weight: [out, in].
        down: [r, in], PEFT's lora_A.
        up: [out, r], PEFT's lora_B.
        alpha: PEFT's lora_alpha.
    """

    def merged() -> Tensor:
        update = (alpha / down.shape[0]) * (up.float() @ down.float())
        return (weight.make().float() + update).to(weight.dtype)

    return PlannedTensor(shape=weight.shape, dtype=weight.dtype, make=merged)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a folder of them, or a file of torch.save, mapped where the format allows.

    Nothing in the file is executed. Files of torch.save older than its zip format cannot be mapped and are read whole.

    Raises:
        UserError: There is no such file, it is damaged, or it holds no weights.
    """
    if is_model_folder(path):
        return {name: tensor for file in weight_files(path) for name, tensor in _read_safetensors(file).items()}
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; give a .pt or .safetensors file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in _NESTED_UNDER:
        if isinstance(content.get(key), dict):
            content = content[key]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights, only {', '.join(map(str, list(content)[:5])) or 'nothing'}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    zipped = path.open("rb").read(4) == b"PK\x03\x04"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds objects besides tensors, which are not executed; save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def write_sharded(folder: Path, tensors: Mapping[str, PlannedTensor], *, max_shard_size: str) -> None:
    """Write model.safetensors, or several files of at most `max_shard_size` and their index, tensor by tensor."""
    outlines = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(outlines, max_shard_size=max_shard_size)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("writing weights", total=sum(t.num_bytes for t in tensors.values()))
        for file, names in split.filename_to_tensors.items():
            chosen = {name: tensors[name] for name in names}
            write_safetensors(folder / file, chosen, on_written=lambda size: progress.advance(task, size))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path, tensors: Mapping[str, PlannedTensor], *, on_written: Callable[[int], None] = lambda _: None
) -> None:
    """Write one safetensors file, holding one tensor in memory at a time.

    The library's own writer takes all of them at once. The format is a length, a JSON header, and the bytes.
    """
    # Wide types first, as the library does: every tensor then starts at a multiple of its element.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{name} is of type {tensor.dtype}, which is not written")
        end = offset + tensor.num_bytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, planned in ordered:
            tensor = planned.make().detach()
            assert tuple(tensor.shape) == planned.shape and tensor.dtype == planned.dtype, name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            on_written(planned.num_bytes)
