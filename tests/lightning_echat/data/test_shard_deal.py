from collections import Counter
from itertools import count

import pytest

from lightning_echat.data.shard_deal import Deal, Place, ShardOrder, Work, parts_for, redeal


def order(num_shards: int, consumers: int, *, deal: Deal | None = None, repeat: bool = False, seed="0") -> ShardOrder:
    deal = deal or Deal(parts=parts_for(num_shards, consumers))
    return ShardOrder(deal, num_shards=num_shards, consumers=consumers, seed=seed, repeat=repeat)


def work_of(dealt: ShardOrder, consumer: int, *, items: int = 10**6, first: int = 0) -> list[Work]:
    found = []
    for item in range(first, items):
        work = dealt.work(item * dealt.consumers + consumer)
        if work is None:
            break
        found.append(work)
    return found


@pytest.mark.parametrize("consumers", [1, 2, 3, 7])
def test_all_consumers_together_read_an_epoch_once(consumers):
    read = Counter(work for consumer in range(consumers) for work in work_of(order(7, consumers), consumer))
    assert read == Counter(Work(0, shard, 0, 1) for shard in range(7))


def test_endless_reading_reads_every_shard_as_often():
    dealt = order(7, 2, repeat=True)
    read = Counter(work.shard for consumer in range(2) for work in work_of(dealt, consumer, items=7 * 5))
    assert set(read.values()) == {10}


def test_consumers_share_shards_where_there_are_too_few():
    read = Counter(work for consumer in range(5) for work in work_of(order(2, 5), consumer))
    assert read == Counter(Work(0, shard, part, 3) for shard in range(2) for part in range(3))


def test_every_epoch_has_an_order_of_its_own_and_the_seed_decides():
    def shards(seed):
        return [work.shard for work in work_of(order(7, 1, repeat=True, seed=seed), 0, items=14)]

    assert shards("a")[:7] != shards("a")[7:]
    assert shards("a") == shards("a")
    assert shards("a") != shards("b")


def test_epochs_are_counted_with_their_fraction():
    dealt = order(4, 2, repeat=True)
    assert [dealt.epochs_before(index) for index in (0, 3, 4, 6)] == [0, 0.75, 1, 1.5]
    once = order(4, 2)
    assert [once.epochs_before(index) for index in (3, 4, 5)] == [0.75, 1, 1]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 5), (1, 3)])
def test_another_number_of_consumers_reads_what_is_left_and_nothing_twice(before, after, repeat):
    # Consumers at different speeds, one in the middle of a part; then dealt anew, twice, in the middle of the epoch.
    dealt = order(11, before, repeat=repeat)
    places = [Place(item=consumer % 3, ordinal=5 if consumer == 0 else -1) for consumer in range(before)]
    read = [work for c in range(before) for work in work_of(dealt, c, items=places[c].item)]
    second = order(11, after, deal=redeal(dealt, places), repeat=repeat)
    later = [Place(item=1 + consumer % 2) for consumer in range(after)]
    read += [work for c in range(after) for work in work_of(second, c, items=later[c].item)]
    third = order(11, 1, deal=redeal(second, later), repeat=repeat)
    for item in count():
        work = third.work(item)
        # A fast consumer may have begun the next epoch, so what it left comes among the rest of this one.
        if work is None or (work.epoch > 0 and item >= len(third.deal.left)):
            break
        read.append(work)
    read = [work for work in read if work.epoch == 0]
    begun = [work for work in read if work.ordinal]
    assert [work.ordinal for work in begun] == [5]
    assert sum(1 / work.parts for work in read) == pytest.approx(11)
    assert Counter((work.shard, work.part) for work in read).most_common(1)[0][1] == 1
    assert (work is not None) == repeat


def test_a_source_that_has_been_read_leaves_nothing():
    dealt = order(3, 2)
    again = order(3, 3, deal=redeal(dealt, [Place(item=2), Place(item=2)]))
    assert [again.work(index) for index in range(3)] == [None] * 3
