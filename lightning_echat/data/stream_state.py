"""Where training data stands, as checkpoints keep it: what continues it exactly, and what is refused.

A state is plain numbers, names and bytes, tensors in a checkpoint, so `torch.load(weights_only=True)` reads it. It
refers to dialogues and holds none: a few bytes for each that sits in a buffer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from lightning_echat.contracts import UserError
from lightning_echat.data.shard_deal import Deal, Place, ShardOrder, Work, redeal
from lightning_echat.data.source_reader import SampleRef, SourceState, held_refs, pack_refs, unpack_refs

FORMAT = 2
"""Of what checkpoints hold. Raise it with every change of what is below, of `SampleRef`, or of the order of draws."""


class Waiting(NamedTuple):
    """A dialogue in the window: which source and task it was drawn for, and where it comes from (see `SampleRef`)."""

    source: int
    task: int
    shard: int
    ordinal: int
    exchange: int
    epoch: int
    check: int

    @property
    def ref(self) -> SampleRef:
        """Where it comes from."""
        return SampleRef(*self[2:])


class WorkerState(TypedDict):
    """What continues one worker process exactly.

    Attributes:
        sources: Of each source's reader.
        drawn: Totals of the mixture, source by task.
        unusable: Dialogues of each source rejected since its last usable one.
        window: `Waiting`s, oldest first, as 32-bit numbers.
        counts: Totals of what was read, which the limit of skips judges by.
    """

    sources: list[SourceState]
    drawn: list[list[int]]
    unusable: list[int]
    window: bytes
    counts: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where one rank's training data stands. Batches carry it, so it is never changed.

    Attributes:
        deals: Of each source.
        workers: The state of each worker after the last batch it gave; None before it gave one.
        next_worker: Whose turn it is.
        passes: How often everything has been read, where no source is repeated.
    """

    deals: tuple[Deal, ...]
    workers: tuple[WorkerState | None, ...]
    next_worker: int = 0
    passes: int = 0

    def after(self, worker: int, state: WorkerState) -> Position:
        """The position once `worker` has given a batch."""
        workers = (*self.workers[:worker], state, *self.workers[worker + 1 :])
        return replace(self, workers=workers, next_worker=(worker + 1) % len(workers))

    @property
    def places(self) -> list[list[Place]]:
        """How far each worker is in each source."""
        begun = [[Place(*source["place"]) for source in state["sources"]] if state else None for state in self.workers]
        return [places or [Place()] * len(self.deals) for places in begun]


def waiting_refs(state: WorkerState) -> list[Waiting]:
    """What the window of a state holds."""
    return [Waiting(*row) for row in unpack_refs(state["window"], width=len(Waiting._fields))]


def to_checkpoint(positions: Sequence[Position], made_by: Mapping[str, str]) -> dict[str, Any]:
    """The positions of all ranks, in order, as a checkpoint keeps them.

    Args:
        positions: One a rank, all after as many batches.
        made_by: Everything that decides the batches, by a name for messages.
    """
    first = positions[0]
    ranks = [{"next_worker": position.next_worker, "workers": list(position.workers)} for position in positions]
    return {
        "format": FORMAT,
        "made_by": dict(made_by),
        "passes": first.passes,
        "deals": _with_tensors([_deal_to_checkpoint(deal) for deal in first.deals]),
        "ranks": _with_tensors(ranks),
    }


def from_checkpoint(state: Mapping[str, Any], made_by: Mapping[str, str]) -> list[Position]:
    """The inverse of `to_checkpoint`: as many positions as there were ranks.

    Raises:
        UserError: Something that decides the batches is not what it was, or another version wrote the state.
    """
    if state.get("format") != FORMAT:
        raise UserError(
            f"the checkpoint's data position has format {state.get('format', 'none')}, this version reads {FORMAT}; go "
            "on with the version that wrote it, or begin a new run from its weights with model.init_args.init_from"
        )
    before = state["made_by"]
    for name in dict.fromkeys([*before, *made_by]):
        if before.get(name) != made_by.get(name):
            raise UserError(
                f"the checkpoint's data cannot be continued exactly: {name} was {before.get(name, 'not there')} and is "
                f"now {made_by.get(name, 'not there')}; set it back, or begin a new run from the checkpoint's weights "
                "with model.init_args.init_from"
            )
    deals = tuple(_deal_from_checkpoint(deal) for deal in _with_bytes(state["deals"]))
    return [
        Position(deals=deals, workers=tuple(rank["workers"]), next_worker=rank["next_worker"], passes=state["passes"])
        for rank in _with_bytes(state["ranks"])
    ]


def _with_tensors(state: Any) -> Any:
    """The same with tensors, of the compressed bytes, for bytes, which `weights_only` does not load."""
    return _mapped(state, bytes, lambda data: torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8))


def _with_bytes(state: Any) -> Any:
    """The inverse of `_with_tensors`."""
    return _mapped(state, Tensor, lambda data: zlib.decompress(data.numpy().tobytes()))


def _mapped(state: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """The same lists and dicts with everything of a kind converted."""
    if isinstance(state, kind):
        return convert(state)
    if isinstance(state, dict):
        return {name: _mapped(value, kind, convert) for name, value in state.items()}
    return [_mapped(value, kind, convert) for value in state] if isinstance(state, list) else state


def _deal_to_checkpoint(deal: Deal) -> dict[str, Any]:
    return {"parts": deal.parts, "epoch": deal.epoch, "start": deal.start, "left": pack_refs(deal.left)}


def _deal_from_checkpoint(state: Mapping[str, Any]) -> Deal:
    left = tuple(Work(*work) for work in unpack_refs(state["left"], width=len(Work._fields)))
    return Deal(parts=state["parts"], epoch=state["epoch"], start=state["start"], left=left)


def redistribute(positions: Sequence[Position], orders: Sequence[ShardOrder], *, world_size: int) -> list[Position]:
    """The positions of another number of ranks, which together go on with everything not given out yet.

    What waits in buffers and windows is dealt out anew, as is what is left of the shards. No dialogue is lost or comes
    twice in its epoch; which comes when is no longer what it would have been.

    Args:
        positions: One for each rank there was.
        orders: The sequence of work of each source, for the consumers there were.
        world_size: Ranks there are now, with as many workers each.
    """
    workers = len(positions[0].workers)
    consumers = world_size * workers
    places = [worker for position in positions for worker in position.places]
    deals = tuple(redeal(order, [worker[i] for worker in places]) for i, order in enumerate(orders))
    states = [state for position in positions for state in position.workers if state is not None]
    new = [_share(states, consumer, consumers) for consumer in range(consumers)] if states else [None] * consumers
    return [
        Position(deals=deals, workers=tuple(new[rank * workers : (rank + 1) * workers]), passes=positions[0].passes)
        for rank in range(world_size)
    ]


def _share(states: Sequence[WorkerState], consumer: int, consumers: int) -> WorkerState:
    """What one of `consumers` takes over of all the states: every so-manieth dialogue, and the mean of the totals."""
    window = [entry for state in states for entry in waiting_refs(state)]
    sources = []
    for sources_of_all in zip(*(state["sources"] for state in states), strict=True):
        held = [ref for source in sources_of_all for ref in held_refs(source)]
        draws = max(source["draws"] for source in sources_of_all)
        sources.append(
            SourceState(place=tuple(Place()), draws=draws, barren=0, held=pack_refs(held[consumer::consumers]))
        )
    drawn = [
        [sum(totals) // consumers for totals in zip(*tasks, strict=True)]
        for tasks in zip(*(state["drawn"] for state in states), strict=True)
    ]
    return WorkerState(
        sources=sources,
        drawn=drawn,
        unusable=[0] * len(sources),
        window=pack_refs(window[consumer::consumers]),
        counts={},
    )
