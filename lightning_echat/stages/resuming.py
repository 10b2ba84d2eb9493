"""What a run needs of the one before to go on in its middle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def recount_batches(checkpoint: dict[str, Any], *, accumulate: int) -> None:
    """Turn the progress of a run into that of one which is to begin a window of `accumulate` micro-batches.

    Lightning counts micro-batches and steps at multiples of the window, so it would go on in the middle of one where
    the window has another length, as with another number of ranks, or where it was broken off; the gradients of its
    beginning are gone, and the datamodule gives all of its batches again.
    """
    before = checkpoint.get("accumulate_grad_batches", accumulate)
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is None:
        return
    # At the end of an epoch Lightning has stepped whatever the length of the window.
    broken_off = 0 if progress["is_last_batch"] else progress["current"]["processed"] % before
    for counts in (progress["total"], progress["current"]):
        batches = counts["processed"] - broken_off
        if before != accumulate:
            batches = batches // before * accumulate
        # Lightning tells by it that the checkpoint was written when a step was over, but not yet what follows one.
        after_step = not broken_off and counts["completed"] == counts["processed"] - 1
        counts.update(ready=batches, started=batches, processed=batches, completed=batches - after_step)


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Have torch's generators on this rank go on from a state of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def random_state() -> dict[str, Tensor]:
    """Of torch's generators on this rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def own_random_state(checkpoint: Mapping[str, Any], *, share: int, shares: int) -> Mapping[str, Tensor] | None:
    """That of a share of the data among the `random_states` of a checkpoint; None where there were other shares."""
    states = checkpoint.get("random_states", [])
    return states[share] if len(states) == shares else None


def restore_random_state(state: Mapping[str, Tensor] | None, device: torch.device) -> None:
    """Go on drawing dropout and noise as the run would have, where the data is dealt out in as many shares."""
    if state is not None:
        set_random_state(state, device)
