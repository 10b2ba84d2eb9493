"""Tensor parallelism: the linear layers of the language model's blocks, cut over ranks that compute one batch together.

Which layer is cut along which side is the model's own plan in Hugging Face's configuration. A layer that is cut by
columns gives each rank the outputs of its heads or units, and one cut by rows takes those in and sums over the ranks,
so what lies between blocks is whole on every rank: two sums a block forward and two backward. All else is computed by
every rank of the group alike.
"""

from __future__ import annotations

import fnmatch

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from lightning_echat.contracts import UserError

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def cut_language_model(llm: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut the layers of the model's plan, each rank its part, without any communication.

    Args:
        llm: On the meta device, with LoRA inside or not.
        mesh: One dimension: the ranks of a group.

    Raises:
        UserError: The model has no plan, one that asks for more than columns and rows, or sizes that do not divide.
    """
    cuts = _planned_cuts(llm)
    _check_sizes(llm, cuts, ranks=mesh.size())
    for layer, style in cuts.values():
        for part in _parts(layer, style):
            parallelize_module(part, mesh, _STYLES[style](), src_data_rank=None)


def _planned_cuts(llm: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """Names of the layers to cut -> the layer and "colwise" or "rowwise"."""
    name = type(llm).__name__
    plan: dict[str, str] = getattr(llm.config, "base_model_tp_plan", None) or {}
    if not plan:
        raise UserError(f"{name} has no plan of tensor parallelism; leave strategy.tensor_parallel at 1")
    if other := [f"{style} for {pattern}" for pattern, style in plan.items() if style not in _STYLES]:
        raise UserError(
            f"the plan of {name} asks for {other[0]}, which is not supported; leave strategy.tensor_parallel at 1"
        )
    cuts: dict[str, tuple[nn.Module, str]] = {
        found: (module, style)
        for found, module in llm.get_decoder().named_modules()
        for pattern, style in plan.items()
        if fnmatch.fnmatchcase(found, pattern)
    }
    for found, (module, _) in cuts.items():
        if not isinstance(module, nn.Linear | LoraLayer):
            raise UserError(
                f"{found} of {name} is no linear layer, so it cannot be cut; leave strategy.tensor_parallel at 1"
            )
    return cuts


def _check_sizes(llm: PreTrainedModel, cuts: dict[str, tuple[nn.Module, str]], *, ranks: int) -> None:
    config = llm.config
    sizes = {what: getattr(config, what, None) for what in ("num_attention_heads", "num_key_value_heads")}
    for found, (module, style) in cuts.items():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        assert isinstance(base, nn.Linear)
        sizes[f"the width of {found}"] = base.out_features if style == "colwise" else base.in_features
    for what, size in sizes.items():
        if size is not None and size % ranks:
            raise UserError(
                f"strategy.tensor_parallel is {ranks}, which does not divide the language model's {size} ({what})"
            )


def _parts(layer: nn.Module, style: str) -> list[nn.Module]:
    """What of a layer is cut. LoRA's two matrices follow theirs: only the side that meets the cut one is cut."""
    if not isinstance(layer, LoraLayer):
        return [layer]
    beside = layer.lora_B if style == "colwise" else layer.lora_A
    return [layer.get_base_layer(), *beside.children()]
