"""Collective calls: every rank makes them together. A process without others is alone and waits for nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether it is true on one rank at least: a collective call."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gathered(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The value of every rank, in their order: a collective call."""
    if not dist.is_initialized():
        return [value]
    values: list[Mapping[str, Any]] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float) -> None:
    """Scale gradients down to a norm over all of them, on whatever meshes they are spread: a collective call."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in by_mesh.values()]
    whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in norms]
    total = torch.stack(whole).norm() if whole else torch.zeros(())
    for group in by_mesh.values():
        clip_grads_with_norm_(group, norm, total)
