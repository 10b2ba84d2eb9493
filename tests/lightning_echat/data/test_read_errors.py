import pytest

from lightning_echat.contracts import UserError
from lightning_echat.data.read_errors import SkipCounter


def counter(*, kept: int = 0, skipped: int = 0) -> SkipCounter:
    made = SkipCounter()
    for _ in range(kept):
        made.keep()
    for number in range(skipped):
        made.skip("broken JSON", shard=f"s{number}.tar", key="k", detail="line 1")
    return made


def test_kept_and_skipped_add_up_to_read():
    made = counter(kept=7, skipped=3)
    assert made.counts["read"] == 10
    assert made.skip_share == 0.3


def test_the_first_example_of_each_reason_is_remembered():
    assert counter(skipped=2).examples == {"skipped/broken JSON": "s0.tar k: line 1"}


def test_counters_are_merged_by_adding():
    total = counter(kept=1, skipped=1)
    total.merge(counter(kept=2, skipped=2))
    total.merge({"read": 1, "skipped/odd": 1})
    assert total.counts["read"] == 7
    assert total.skipped == {"broken JSON": 3, "odd": 1}


def test_what_was_taken_is_not_taken_again():
    made = counter(kept=2)
    assert made.take() == {"read": 2, "kept": 2}
    made.skip("odd")
    assert made.take() == {"read": 1, "skipped/odd": 1}
    assert made.take() == {}
    assert made.counts["read"] == 3


def test_too_many_skips_stop_the_run_with_the_reasons():
    counter(kept=95, skipped=5).check(max_share=0.05)
    with pytest.raises(
        UserError, match=r"6 of 100 samples would be skipped: 6 broken JSON \(first: s0.tar k: line 1\)"
    ):
        counter(kept=94, skipped=6).check(max_share=0.05)


def test_a_few_samples_are_no_reason_to_stop():
    counter(kept=1, skipped=10).check(max_share=0.05)


def test_what_is_noticed_costs_no_sample():
    made = counter(kept=1)
    made.notice("clipped audio", shard="s.tar", key="k")
    assert made.counts["read"] == 1
    assert made.summary() == "1 samples: noticed 1 clipped audio (first: s.tar k)"


def test_each_reason_is_logged_once(caplog):
    counter(skipped=5)
    assert len(caplog.records) == 1
