"""One stretch of memory for all tensors of a batch, so that a worker process hands over one thing and copies nothing.

Torch would hand over each tensor by a file descriptor of its own, after a copy of it into shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from lightning_echat.contracts import PackedBatch

Shape = tuple[int, ...]
_ALIGNMENT = 64


def allocate(fields: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, Tensor]:
    """Tensors of zeros of the given shapes, all in one storage; in a worker process of a loader it is shared memory."""
    offsets, total = {}, 0
    for name, (shape, dtype) in fields.items():
        offsets[name] = total
        total += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    memory = _shared(total) if get_worker_info() else torch.zeros(total, dtype=torch.uint8)
    return {name: _view(memory, offsets[name], *fields[name]) for name in fields}


def _shared(size: int) -> Tensor:
    # What torch's own collate allocates. The system gives it filled with zeros.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))  # type: ignore[arg-type]


def _view(memory: Tensor, offset: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)


@dataclass(slots=True, kw_only=True)
class HandedBatch:
    """A batch on its way between processes.

    Attributes:
        memory: [bytes] uint8, all of its tensors.
        places: Field -> where in `memory` it begins, and its shape and type.
        rest: The fields that are no tensors.
    """

    memory: Tensor
    places: dict[str, tuple[int, Shape, torch.dtype]]
    rest: dict[str, Any]

    @classmethod
    def of(cls, batch: PackedBatch) -> HandedBatch:
        """The batch, whose tensors must all come from one `allocate`."""
        storage = batch.input_ids.untyped_storage()
        fields = {name: getattr(batch, name) for name in batch.__slots__}
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        assert all(tensor.untyped_storage().data_ptr() == storage.data_ptr() for tensor in tensors.values())
        places = {
            name: (int(tensor.storage_offset()) * tensor.element_size(), tuple(tensor.shape), tensor.dtype)
            for name, tensor in tensors.items()
        }
        rest = {name: value for name, value in fields.items() if name not in tensors}
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
        return cls(memory=memory, places=places, rest=rest)

    def pin_memory(self) -> HandedBatch:
        """Pin all of it at once; torch's loader calls this."""
        self.memory = self.memory.pin_memory()
        return self

    def batch(self) -> PackedBatch:
        """The batch as it was; nothing is copied."""
        tensors = {name: _view(self.memory, *place) for name, place in self.places.items()}
        return PackedBatch(**tensors, **self.rest)
