"""Sharded checkpoints on disk: folders that torch's DCP and Lightning write, read without executing anything.

A folder holds `.metadata` (what tensors there are and where), one `.distcp` file a rank, and Lightning's `meta.pt`
(everything that is no tensor). It gets its name only once it is whole, see `parallel.ShardedStrategy`.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from lightning_echat.contracts import UserError

_METADATA = ".metadata"
REST = "meta.pt"
"""File of what is no tensor."""
_WEIGHTS = "state_dict."
_TRUSTED = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
}


def is_sharded(path: Path) -> bool:
    """Whether `path` is a whole sharded checkpoint."""
    return (path / _METADATA).is_file() and (path / REST).is_file()


def check_sharded(path: Path) -> None:
    """Refuse a folder that is no checkpoint, is not whole, or whose index holds anything but an index."""
    if not is_sharded(path):
        raise UserError(f"{path} is no checkpoint: a sharded one is a folder with {_METADATA} and {REST}")
    metadata = _read_metadata(path)
    files = {getattr(where, "relative_path", None) for where in (metadata.storage_data or {}).values()}
    for file in sorted(str(file) for file in files if file):
        # Names come from the file: they must stay inside the folder.
        if Path(file).name != file or not (path / file).is_file():
            raise UserError(f"checkpoint {path} lacks {file}; use another checkpoint")


def read_sharded(path: Path, *, optimizer: bool = False) -> dict[str, Any]:
    """A sharded checkpoint as one of a single file has it: whole tensors on the CPU.

    Args:
        path: The folder.
        optimizer: Also the optimizers' states, as a list under "optimizer_states", by names of parameters.
    """
    check_sharded(path)
    with _told(path):
        rest = torch.load(path / REST, map_location="cpu", weights_only=True)
        index = _read_metadata(path)
        flat: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else io.BytesIO()
            for name, entry in index.state_dict_metadata.items()
            if optimizer or name.startswith(_WEIGHTS)
        }
        _load(flat, path)
    weights = {name.removeprefix(_WEIGHTS): tensor for name, tensor in flat.items() if name.startswith(_WEIGHTS)}
    whole = {**rest, "state_dict": weights}
    if optimizer:
        paths = index.planner_data or {}
        nested = _nested({paths[name]: value for name, value in flat.items() if not name.startswith(_WEIGHTS)})
        whole["optimizer_states"] = [nested[name] for name in sorted(nested)]
    return whole


def sharded_shapes(path: Path, *, prefix: str) -> dict[str, torch.Size]:
    """Shapes of the weights whose names begin with `prefix`, by the rest of their names; no weight is read."""
    check_sharded(path)
    whole = f"{_WEIGHTS}{prefix}"
    return {
        name.removeprefix(whole): entry.size
        for name, entry in _read_metadata(path).state_dict_metadata.items()
        if name.startswith(whole) and isinstance(entry, TensorStorageMetadata)
    }


def fill_from_sharded(path: Path, targets: Mapping[str, Tensor], *, prefix: str) -> None:
    """Copy weights into tensors, each rank its part, whatever the number of ranks that wrote. No collective call."""
    with _told(path):
        _load({f"{_WEIGHTS}{prefix}{name}": target for name, target in targets.items()}, path)


def _load(flat: dict[str, Any], path: Path) -> None:
    planner = _SafePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # It remarks that it reads on one process, which is what it was asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(flat, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong in reading, in one line."""
    try:
        yield
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, CheckpointException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error


def _nested(flat: dict[tuple[str | int, ...], Any]) -> Any:
    """Values under paths of keys -> dicts of dicts, and lists where the keys are numbers."""
    if list(flat) == [()]:
        return flat[()]
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for (key, *rest), value in flat.items():
        below.setdefault(key, {})[tuple(rest)] = value
    if all(isinstance(key, int) for key in below):
        return [_nested(below[key]) for key in sorted(below)]
    return {key: _nested(part) for key, part in below.items()}


class _SafePlanner(DefaultLoadPlanner):
    """What is no tensor is a pickle as well, read like any checkpoint: nothing in it is executed."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _IndexUnpickler(pickle.Unpickler):
    """The index is a pickle: only the classes that an index is made of may occur in it."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _TRUSTED:
            raise pickle.UnpicklingError(f"its index names {module_name}.{global_name}, which no index needs")
        return super().find_class(module_name, global_name)


def _read_metadata(path: Path) -> Metadata:
    try:
        with (path / _METADATA).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"cannot read checkpoint {path}: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"cannot read checkpoint {path}: {_METADATA} is no index of a sharded checkpoint")
    return metadata
