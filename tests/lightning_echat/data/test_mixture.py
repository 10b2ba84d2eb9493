from collections import Counter

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.mixture import Mixture, SourceConfig, TaskConfig, asked_shares, check_sources


def source(name: str = "a", **options) -> SourceConfig:
    return SourceConfig(**{"name": name, "shards": ["x.tar"], "tasks": [TaskConfig(kind="transcribe")], **options})


def drawn(mixture: Mixture, count: int, *, alive=(0, 1, 2), ids=(1, 1, 1)) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for _ in range(count):
        place = mixture.next_source(alive)
        task = mixture.next_task(place)
        mixture.add(place, task, ids=ids[place])
        found[place, task] += 1
    return found


THREE = [source("a", weight=3), source("b", weight=1), source("c", weight=4)]


def test_sources_are_drawn_by_weight():
    assert drawn(Mixture(THREE), 80) == {(0, 0): 30, (1, 0): 10, (2, 0): 40}


def test_no_source_waits_for_its_share():
    mixture = Mixture(THREE)
    for count in range(1, 200):
        drawn(mixture, 1)
        for place, weight in enumerate((3, 1, 4)):
            assert abs(sum(mixture.drawn[place]) - count * weight / 8) <= 1


def test_weights_by_tokens_share_out_ids():
    mixture = Mixture(THREE, by="tokens")
    found = drawn(mixture, 4000, ids=(100, 10, 40))
    ids = {0: found[0, 0] * 100, 1: found[1, 0] * 10, 2: found[2, 0] * 40}
    assert [ids[place] / sum(ids.values()) for place in range(3)] == pytest.approx([3 / 8, 1 / 8, 4 / 8], rel=0.01)


def test_weights_stay_right_when_a_source_ends():
    mixture = Mixture(THREE)
    drawn(mixture, 80)
    assert drawn(mixture, 50, alive=(1, 2)) == {(1, 0): 10, (2, 0): 40}


def test_tasks_are_drawn_by_weight():
    tasks = [TaskConfig(kind="transcribe", weight=1), TaskConfig(kind="speech_to_text", weight=3)]
    assert drawn(Mixture([source(tasks=tasks)]), 40, alive=(0,)) == {(0, 0): 10, (0, 1): 30}


def test_a_mixture_goes_on_from_its_totals():
    first, whole = Mixture(THREE), Mixture(THREE)
    assert drawn(first, 17) + drawn(Mixture(THREE, drawn=first.drawn), 23) == drawn(whole, 40)


def test_shares_asked_for_are_named_as_draws_are_counted():
    tasks = [TaskConfig(kind="transcribe", weight=1), TaskConfig(kind="text_to_text", weight=3)]
    shares = asked_shares([source("a", tasks=tasks, weight=1), source("b", weight=3)])
    assert shares == {"a/transcribe": 1 / 16, "a/text_to_text": 3 / 16, "b/transcribe": 3 / 4}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no train sources"),
        ([source(), source()], "two train sources are named 'a'"),
        ([source(tasks=[])], "'a' names no task"),
        ([source(weight=0)], "source 'a': weight is 0"),
        ([source(weight=float("nan"))], "weight is nan"),
        ([source(tasks=[TaskConfig(kind="transcribe", weight=-1)])], "task transcribe: weight is -1"),
        ([source(tasks=[TaskConfig(kind="label")])], "needs labels"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(sources, message):
    with pytest.raises(UserError, match=message):
        check_sources(sources)
