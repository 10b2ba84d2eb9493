"""The equation of resuming: the first k batches and the rest are all the batches, for every k."""

import io
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.data import shard_reader
from lightning_echat.data.augmentation import AugmentationConfig
from lightning_echat.data.batching import BatchingConfig
from lightning_echat.data.loader import TrainingLoader
from lightning_echat.data.mixture import TaskConfig
from lightning_echat.data.shard_deal import Deal
from lightning_echat.data.source_reader import SourceState, held_refs, pack_refs
from lightning_echat.data.stream_state import (
    Position,
    WorkerState,
    from_checkpoint,
    redistribute,
    to_checkpoint,
    waiting_refs,
)
from lightning_echat.testing import write_dummy_shards
from tests.lightning_echat.data.data_helpers import SIDECAR, members, write_tar
from tests.lightning_echat.data.stream_helpers import (
    InTurn,
    digests,
    keys,
    restored,
    some,
    source,
    stored,
    streaming,
    training,
)

SMALL = BatchingConfig(tokens_per_batch=420, max_ids=400, pool=6, shuffle=4)
TASKS = [TaskConfig(kind="transcribe", weight=2), TaskConfig(kind="speech_to_text", thinking="label")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three shards of five dialogues in two tasks, one of four dialogues of two exchanges, one with broken samples."""
    folder = tmp_path_factory.mktemp("mixture")
    write_dummy_shards(folder / "a", shards=3, samples_per_shard=5)
    write_dummy_shards(folder / "b", shards=1, samples_per_shard=4, exchanges=2, first=500)
    content = {}
    for number in range(9):
        content |= members(f"k{number}", sidecar=SIDECAR if number % 3 else b"{")
    write_tar(folder / "c.tar", content)
    return [
        source(folder / "a", weight=3, tasks=TASKS),
        source(folder / "b", name="b", weight=2, kind="speech_to_speech"),
        source(folder / "c.tar", name="c", weight=1),
    ]


def options(**changed):
    return {"batching": SMALL, "augmentation": AugmentationConfig(), "max_skip_share": 0.9, **changed}


def of_ranks(tokens, sources, *, world_size, workers, positions=None, kind=InTurn, **changed) -> list[TrainingLoader]:
    """The loaders of a job, one a rank, as `restored` from `positions`."""
    made = []
    for rank in range(world_size):
        position = positions[rank] if positions else None
        ranks = options(rank=rank, world_size=world_size, **changed)
        made.append(training(tokens, sources, workers=workers, kind=kind, position=position, **ranks))
    return made


def made_by(loader: TrainingLoader, *, workers: int) -> dict[str, str]:
    return loader.stream.made_by(workers=workers)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_first_k_batches_and_the_rest_are_all_for_every_k(tokens, sources, world_size, workers, packed):
    settings = {"world_size": world_size, "workers": workers, "batching": replace(SMALL, packed=packed)}
    loaders = of_ranks(tokens, sources, **settings)
    count = 24 // world_size
    everything = [some(loader, count) for loader in loaders]
    names = made_by(loaders[0], workers=workers)
    epochs = loaders[0].stream.epochs(everything[0][-1].position)
    assert set(epochs) == {"a", "b", "c"} and min(epochs.values()) >= 2
    whole = [digests(batches) for batches in everything]
    for k in range(1, count):
        positions = restored([batches[k - 1].position for batches in everything], names)
        rest = of_ranks(tokens, sources, positions=positions, **settings)
        assert [digests(some(loader, count - k)) for loader in rest] == [one[k:] for one in whole], k


def test_the_equation_holds_to_the_end_of_what_is_read_once_and_beyond(tokens, sources):
    once = [replace(one, repeat=False) for one in sources]

    def passes(position=None):
        loader = training(tokens, once, workers=2, kind=InTurn, position=position, **options())
        return [*loader, *loader][: None if position is None else len(everything) - k]

    everything = passes()
    expected = Counter({f"dialogue-{i:06d}": 2 for i in range(15)})
    expected |= Counter({f"dialogue-{i:06d}#{n}": 2 for i in range(500, 504) for n in (1, 2)})
    expected |= Counter({f"k{number}": 2 for number in range(9) if number % 3})
    assert Counter(keys(everything)) == expected
    whole = digests(everything)
    names = made_by(training(tokens, once, **options()), workers=2)
    for k in range(1, len(everything)):
        (position,) = restored([everything[k - 1].position], names)
        # A third pass would follow; what the first one continued lacks is cut off.
        assert digests(passes(position))[: len(everything) - k] == whole[k:], k


@pytest.mark.parametrize("k", [1, 6, 7])
def test_worker_processes_go_on_where_others_were_stopped(tokens, sources, k):
    changed = options(rank=1, world_size=2)
    whole = some(training(tokens, sources, workers=2, **changed), 14)
    first = training(tokens, sources, workers=2, **changed)
    beginning = list(islice(first, k))
    (position,) = restored([first.position], made_by(first, workers=2))
    rest = some(training(tokens, sources, workers=2, position=position, **changed), 14 - k)
    assert digests(beginning) + digests(rest) == digests(whole)


def test_what_was_noticed_and_read_is_counted_once_over_an_interruption(tokens, sources):
    whole = training(tokens, sources, **options())
    some(whole, 20)
    first = training(tokens, sources, **options())
    some(first, 9)
    (position,) = restored([first.position], made_by(first, workers=1))
    rest = training(tokens, sources, position=position, **options())
    some(rest, 11)
    assert first.health.counts + rest.health.counts == whole.health.counts


@pytest.mark.parametrize("worlds", [(2, 3, 1), (1, 2, 3)])
def test_another_number_of_ranks_goes_on_with_every_remaining_dialogue_once(tokens, sources, worlds):
    once = [replace(one, repeat=False) for one in sources]
    positions, found, workers = None, Counter(), 2
    for place, world_size in enumerate(worlds):
        loaders = of_ranks(tokens, once, world_size=world_size, workers=workers, positions=positions)
        last = place == len(worlds) - 1
        batches = [list(loader) if last else some(loader, 2) for loader in loaders]
        found.update(key for one in batches for key in keys(one))
        if not last:
            positions = restored([one[-1].position for one in batches], made_by(loaders[0], workers=workers))
            orders = loaders[0].stream.orders(positions[0].deals, consumers=world_size * workers)
            positions = redistribute(positions, orders, world_size=worlds[place + 1])
            positions = restored(positions, made_by(loaders[0], workers=workers))
    expected = [f"dialogue-{i:06d}" for i in range(15)] + [f"k{n}" for n in range(9) if n % 3]
    expected += [f"dialogue-{i:06d}#{n}" for i in range(500, 504) for n in (1, 2)]
    assert found == Counter(expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "data.seed was 0 and is now 1"),
        ({"batching": replace(SMALL, pool=7)}, "data.batching.pool was 6 and is now 7"),
        ({"mixture_by": "tokens"}, "data.mixture_by was samples and is now tokens"),
        ({"expand_history": False}, "data.expand_history was True and is now False"),
    ],
)
def test_a_changed_setting_is_refused_by_name(tokens, sources, change, named):
    before = stored([some(training(tokens, sources, **options()), 1)[0].position], _names(tokens, sources))
    with pytest.raises(UserError, match=named) as error:
        from_checkpoint(before, _names(tokens, sources, **change))
    assert "\n" not in str(error.value) and "init_from" in str(error.value)


@pytest.mark.parametrize("written", [None, 1])
def test_a_state_of_another_format_is_refused_in_one_line(tokens, sources, written):
    names = _names(tokens, sources)
    before = stored([some(training(tokens, sources, **options()), 1)[0].position], names) | {"format": written}
    if written is None:
        del before["format"], before["deals"]
    with pytest.raises(UserError, match=r"format (none|1), this version reads") as error:
        from_checkpoint(before, names)
    assert "\n" not in str(error.value) and "init_from" in str(error.value)


def test_other_workers_shards_and_sources_are_refused_by_name(tokens, sources, tmp_path):
    before = stored([streaming(tokens, sources, **options()).start(workers=1)], _names(tokens, sources))
    with pytest.raises(UserError, match=r"data\.num_workers was 1 and is now 2"):
        from_checkpoint(before, streaming(tokens, sources, **options()).made_by(workers=2))
    more = write_dummy_shards(tmp_path / "a", shards=4, samples_per_shard=1)
    with pytest.raises(UserError, match=r"list of shards of source 'a' was 3 .* and is now 4 "):
        from_checkpoint(before, _names(tokens, [replace(sources[0], shards=[str(more)]), *sources[1:]]))
    with pytest.raises(UserError, match="names of the train sources was a, b, c and is now a, b"):
        from_checkpoint(before, _names(tokens, sources[:2]))
    with pytest.raises(UserError, match="weight of source 'b' was 2 and is now 5"):
        from_checkpoint(before, _names(tokens, [sources[0], replace(sources[1], weight=5), sources[2]]))


def test_a_folder_of_shards_may_move(tokens, tmp_path):
    for name in ("here", "there"):
        write_dummy_shards(tmp_path / name, shards=2, samples_per_shard=2)
    here, there = (_names(tokens, [source(tmp_path / name)]) for name in ("here", "there"))
    assert here == there


def _names(tokens, sources, **changed) -> dict[str, str]:
    return streaming(tokens, sources, **options(**changed)).made_by(workers=1)


def test_restoring_reads_only_the_shards_that_buffers_refer_to(tokens, tmp_path, monkeypatch):
    folder = write_dummy_shards(tmp_path, shards=12, samples_per_shard=4)
    first = training(tokens, [source(folder)], **options())
    some(first, 6)
    (position,) = restored([first.position], made_by(first, workers=1))
    again, on = [], []

    def spy(original, opened):
        def read(shard, *args, **kwargs):
            opened.append(getattr(shard, "path", shard))
            return original(shard, *args, **kwargs)

        return read

    monkeypatch.setattr(shard_reader, "read_samples", spy(shard_reader.read_samples, again))
    monkeypatch.setattr(shard_reader, "read_shard", spy(shard_reader.read_shard, on))
    some(training(tokens, [source(folder)], position=position, **options()), 1)
    state = position.workers[0]
    assert state is not None
    held = {ref.shard for ref in dialogues_of(state)}
    assert len(held) < 8 and sorted(again) == sorted(first.stream.shards[0][shard] for shard in held)
    # Besides, the shard that was being read goes on, and those that the next batch takes follow.
    assert len(on) <= 3


def dialogues_of(state: WorkerState):
    refs = [entry.ref for entry in waiting_refs(state)]
    return refs + [ref for one in state["sources"] for ref in held_refs(one)]


def test_a_shard_that_has_lost_a_sample_is_named(tokens, tmp_path):
    folder = write_dummy_shards(tmp_path, shards=1, samples_per_shard=9)
    first = training(tokens, [source(folder)], **options())
    some(first, 1)
    write_dummy_shards(tmp_path, shards=1, samples_per_shard=1)
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample \d+, which the checkpoint refers to"):
        some(training(tokens, [source(folder)], position=first.position, **options()), 1)


def test_a_shard_that_holds_other_samples_in_the_same_places_is_named(tokens, tmp_path):
    folder = write_dummy_shards(tmp_path, shards=1, samples_per_shard=9)
    first = training(tokens, [source(folder)], **options())
    some(first, 1)
    write_dummy_shards(tmp_path, shards=1, samples_per_shard=9, first=100)
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample \d+, which the checkpoint .* is another one now"):
        some(training(tokens, [source(folder)], position=first.position, **options()), 1)


def test_a_state_is_under_a_megabyte():
    # Full buffers of the default sizes, of five sources of 100,000 shards, on 8 ranks of 4 workers.
    default = BatchingConfig()
    random = torch.Generator().manual_seed(0)

    def refs(count, *before):
        columns = [100_000, 1000, 1, 3, 2**16]
        drawn = [torch.randint(high, (count,), generator=random).tolist() for high in (*before, *columns)]
        return pack_refs(zip(*drawn, strict=True))

    def worker() -> WorkerState:
        held = [SourceState(place=(900, 3, 1), draws=10**6, barren=0, held=refs(default.shuffle)) for _ in range(5)]
        counts = {f"noticed/{number}": 1000 for number in range(10)}
        return WorkerState(
            sources=held, drawn=[[10**9] * 3] * 5, unusable=[0] * 5, window=refs(default.pool, 5, 3), counts=counts
        )

    deals = tuple(Deal(parts=1) for _ in range(5))
    ranks = [Position(deals=deals, workers=tuple(worker() for _ in range(4))) for _ in range(8)]
    file = io.BytesIO()
    torch.save(to_checkpoint(ranks, {}), file)
    assert file.tell() < 10**6
