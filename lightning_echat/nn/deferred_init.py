"""A network built without its weights, and its weights computed later, one at a time, wherever their shards lie.

A process that keeps a part of a network never needs the whole: `DeferredInit` builds it on the meta device and writes
down how each parameter is to be filled, with the state of the random generator. Afterwards `fill` draws one parameter,
keeps this rank's part of it, and forgets the rest. The numbers are to the bit those of an ordinary construction,
whatever the number of ranks, and the generator ends where it would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_echat.contracts import UserError

_OVERWRITING = {"normal_", "uniform_", "fill_", "zero_", "copy_"}
_ACTIVE: ContextVar[DeferredInit | None] = ContextVar("_ACTIVE", default=None)


@dataclass(frozen=True, slots=True)
class _Step:
    """An in-place operation on a parameter or a view of it."""

    operation: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    args: tuple[Any, ...]
    options: dict[str, Any]
    random_state: Tensor | None

    def apply(self, whole: Tensor) -> None:
        options = dict(self.options)
        if self.random_state is not None:
            options["generator"] = torch.Generator()
            options["generator"].set_state(self.random_state)
        self.operation(whole.as_strided(self.size, self.stride, self.offset), *self.args, **options)


class _Scratch:
    """Memory for one tensor at a time. Were each allocated anew, small ones that stay would split what they leave."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """A CPU tensor of that shape, with whatever values."""
        extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        held = self._memory.get(tensor.dtype)
        if held is None or held.numel() < extent:
            self._memory.pop(tensor.dtype, None)
            held = self._memory[tensor.dtype] = torch.empty(extent, dtype=tensor.dtype)
        return held.as_strided(tensor.shape, tensor.stride())


@dataclass(slots=True)
class _Recipe:
    """How one parameter gets its values.

    Attributes:
        parameter: On the meta device; kept, as its storage is what it is known by.
        start: What it was made from, where that was not empty memory.
        steps: What was done to it since.
    """

    parameter: Tensor
    start: Tensor | None = None
    steps: list[_Step] = field(default_factory=list)

    def cook(self, scratch: _Scratch) -> Tensor:
        """The whole parameter, on the CPU, until the next one is cooked."""
        whole = scratch.like(self.parameter)
        if self.start is not None:
            whole.copy_(self.start)
        for step in self.steps:
            step.apply(whole)
        return whole


class DeferredInit(TorchDispatchMode):
    """While active, parameters of new modules are on the meta device; buffers are computed as ever.

    Random numbers are drawn twice in all: here, one parameter at a time, to bring the generator on; and in `fill`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[int, _Recipe] = {}
        self._names: dict[str, _Recipe] = {}
        self._empty: dict[int, Any] = {}
        self._drawn = True
        self._scratch = _Scratch()

    @classmethod
    def active(cls) -> DeferredInit | None:
        """The one in whose context this is called."""
        return _ACTIVE.get()

    def __enter__(self) -> DeferredInit:
        self._hook = register_module_parameter_registration_hook(self._take)  # type: ignore[arg-type]
        self._token = _ACTIVE.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _ACTIVE.reset(self._token)
        self._hook.remove()
        self._empty.clear()
        self._scratch = _Scratch()

    @contextmanager
    def undrawn(self) -> Iterator[None]:
        """For parts whose weights will be read: no random number is drawn, and nothing but their shapes is kept."""
        self._drawn = False
        try:
            yield
        finally:
            self._drawn = True

    def name(self, model: nn.Module) -> None:
        """Remember the parameters by their names, which outlast the sharding that replaces them."""
        known = dict(model.named_parameters(remove_duplicate=False))
        self._names = {name: self._recipes[_key(parameter)] for name, parameter in known.items()}

    def fill(self, model: nn.Module, *, but: set[str]) -> None:
        """Give the model's parameters, or this rank's parts of them, the values that they were to begin with.

        Args:
            model: That of `name`, sharded or not, its parameters in memory. Takes one of them whole at a time.
            but: Names of those that have their values already.
        """
        scratch = _Scratch()
        for name, parameter in model.named_parameters():
            if name not in but:
                fill_part(parameter, self._names[name].cook(scratch))

    def _take(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """Hook: put a parameter that is registered on the meta device."""
        if parameter is None or parameter.is_meta:
            return None
        fresh = self._empty.pop(_key(parameter), None) is not None
        values = parameter.detach()
        outline = type(parameter)(values.to("meta"), requires_grad=parameter.requires_grad)
        vars(outline).update(vars(parameter))
        self._recipes[_key(outline)] = _Recipe(outline, None if fresh or not self._drawn else values)
        return outline

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        changes = func._schema.is_mutable and bool(args) and isinstance(args[0], Tensor)
        if changes and args[0].is_meta and _key(args[0]) in self._recipes:
            if self._drawn:
                self._record(func, args[0], args[1:], options)
        elif changes:
            self._empty.pop(_key(args[0]), None)
        result = func(*args, **options)
        if func is torch.ops.aten.empty.memory_format:
            # Held, so that no other tensor gets its address.
            self._empty[_key(result)] = result.untyped_storage()
        return result

    def _record(self, func: Any, target: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in (*args, *options.values())):
            raise UserError(
                f"a parameter of {tuple(target.shape)} is initialised from others, which goes not shard by shard; "
                f"train this language model whole"
            )
        recipe = self._recipes[_key(target)]
        state = None
        if any(argument.name == "generator" for argument in func._schema.arguments):
            state = torch.get_rng_state()
            func(self._scratch.like(target), *args, **options)
        if target.numel() == recipe.parameter.numel() and func._schema.name.split("::")[1] in _OVERWRITING:
            recipe.start, recipe.steps = None, []
        place = (target.shape, target.stride(), int(target.storage_offset()))
        recipe.steps.append(_Step(func, *place, tuple(args), options, state))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, shared with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))


@torch.no_grad()
def fill_part(tensor: Tensor, whole: Any) -> None:
    """Copy this rank's part of `whole`, a tensor or what can be sliced like one. Nothing else of it is read."""
    own = local(tensor)
    if own.numel():
        own.copy_(whole[part_of(tensor)])


def to_memory(model: nn.Module, device: torch.device) -> None:
    """Give what is on the meta device memory, without values; what is elsewhere stays, as buffers do.

    Parameters stay the objects that they are, so those that are tied stay tied.
    """
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
