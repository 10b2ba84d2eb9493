"""Which parts train: chosen by name pattern, and a pattern that matches nothing is an error."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from lightning_echat.contracts import UserError


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> int:
    """Let exactly the parameters train whose names match a pattern, for instance "encoder.*" or "lm.speech_head.*".

    Under LoRA the base weights of the language model stay frozen whatever the patterns say: only its adapters match.

    Returns:
        Number of trainable parameters.

    Raises:
        UserError: A pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            parts = sorted({name.split(".")[0] for name in names})
            raise UserError(f"trainable pattern {pattern!r} matches no parameter; the parts are {', '.join(parts)}")
    has_lora = any(".lora_" in name for name in names)
    count = 0
    for name, parameter in model.named_parameters():
        frozen_by_lora = has_lora and name.startswith("lm.llm.") and ".lora_" not in name
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(chosen and not frozen_by_lora)
        count += parameter.numel() * parameter.requires_grad
    if count == 0:
        raise UserError(f"nothing trains: every parameter that {list(patterns)} matches is frozen by LoRA")
    return count


def frozen_in_eval(model: nn.Module) -> None:
    """Put every module in eval mode whose parameters are all frozen, so that its dropout is off while others train."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.train(False)
