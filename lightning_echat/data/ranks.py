"""The processes of a job, for the little that the data engine has to agree on."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

Thing = TypeVar("Thing")


class Ranks:
    """All ranks, over a process group of their own on the CPU, so that no accelerator waits for the reading of data.

    Made by every rank at the same point, and every method is called by every rank. A process without others is alone.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    def gather(self, mine: Thing) -> list[Thing]:
        """Every rank's, in order."""
        if self._group is None:
            return [mine]
        everyones: list[Thing | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine, group=self._group)
        return everyones  # type: ignore[return-value]  # every place has been filled

    def any_of(self, *mine: bool) -> list[bool]:
        """Of each of the questions, whether any rank says yes."""
        if self._group is None:
            return list(mine)
        answers = torch.tensor(mine, dtype=torch.uint8)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(answer) for answer in answers]
