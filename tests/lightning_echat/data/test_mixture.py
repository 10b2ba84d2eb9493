from collections import Counter
from itertools import islice, repeat
from random import Random

import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.mixture import Mixture, SourceConfig, TaskConfig, check_sources, draw_task


def source(name: str = "a", **options) -> SourceConfig:
    return SourceConfig(**{"name": name, "shards": ["x.tar"], "tasks": [TaskConfig(kind="transcribe")], **options})


def test_sources_are_drawn_by_weight():
    mixture = Mixture([repeat("a"), repeat("b"), repeat("c")], [3, 1, 4], Random(0))
    drawn = Counter(islice(mixture, 8000))
    assert drawn["a"] / 8000 == pytest.approx(3 / 8, abs=0.02)
    assert drawn["b"] / 8000 == pytest.approx(1 / 8, abs=0.02)


def test_weights_stay_right_when_a_source_ends():
    mixture = Mixture([iter(["a"] * 100), repeat("b"), repeat("c")], [8, 3, 1], Random(0))
    drawn = list(islice(mixture, 8000))
    assert drawn.count("a") == 100
    after = Counter(drawn[len(drawn) - drawn[::-1].index("a") :])
    assert after["b"] / after["c"] == pytest.approx(3, rel=0.1)


def test_a_mixture_ends_when_all_its_sources_have():
    assert Counter(Mixture([iter("aaa"), iter("bb")], [1, 100], Random(0))) == Counter(a=3, b=2)


def test_tasks_are_drawn_by_weight():
    tasks = [TaskConfig(kind="transcribe", weight=1), TaskConfig(kind="speech_to_text", weight=3)]
    random = Random(0)
    drawn = Counter(draw_task(tasks, random=random).name for _ in range(4000))
    assert drawn["speech_to_text"] / 4000 == pytest.approx(0.75, abs=0.03)


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
        ([source(repeat=False)], "repeat: true"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_from_is_refused(sources, message):
    with pytest.raises(UserError, match=message):
        check_sources(sources)
