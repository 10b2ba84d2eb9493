"""A sharded checkpoint as one file, on one machine without the cluster that wrote it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lightning_echat.contracts import UserError
from lightning_echat.nn.sharded_files import read_sharded
from lightning_echat.nn.weights import latest_checkpoint


def consolidate(checkpoint: Path, out: Path, weights_only: bool = False) -> None:
    """Write a sharded checkpoint as a single file that every strategy resumes from and every command reads.

    Args:
        checkpoint: A sharded checkpoint or the folder of a run that has saved one.
        out: The .ckpt file to write.
        weights_only: Leave out the optimizer's state, two thirds of the file; the run can then not be continued.
    """
    path = latest_checkpoint(checkpoint)
    if not path.is_dir():
        raise UserError(f"{path} is a single file already")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the file to write, for instance {out / 'model.ckpt'}")
    whole = read_sharded(path, optimizer=not weights_only)
    whole["optimizer_states"] = [_by_number(state) for state in whole.get("optimizer_states", [])]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save(whole, partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    weights = sum(tensor.numel() for tensor in whole["state_dict"].values())
    sys.stdout.write(f"{out}: {weights:,} weights of step {whole.get('global_step', 0)}, from {path}\n")


def _by_number(state: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state under its parameters' names -> under their numbers, as optimizers themselves keep it."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        ids = [numbers.setdefault(name, len(numbers)) for name in group["params"]]
        groups.append({**group, "params": ids})
    return {"state": {numbers[name]: entry for name, entry in state["state"].items()}, "param_groups": groups}
