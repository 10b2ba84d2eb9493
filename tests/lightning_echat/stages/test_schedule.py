import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from lightning_echat.stages.schedule import WarmupCosine, WarmupInverseSquareRoot


def rates(make, steps: int) -> list[float]:
    """Learning rates of the first steps, the optimizer's own being 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule: LRScheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_a_cosine_rises_falls_and_stays():
    found = rates(lambda o: WarmupCosine(o, warmup_steps=4, total_steps=8, final_share=0.2), 11)
    # Half way down: 0.2 + 0.8 / 2. A quarter: 0.2 + 0.8 (1 + √½) / 2.
    expected = [0.25, 0.5, 0.75, 1, 1, 0.882843, 0.6, 0.317157, 0.2, 0.2, 0.2]
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_cosine_needs_no_warmup():
    assert rates(lambda o: WarmupCosine(o, warmup_steps=0, total_steps=2, final_share=0.0), 3) == [1, 0.5, 0]


def test_the_references_schedule_falls_with_the_square_root():
    found = rates(lambda o: WarmupInverseSquareRoot(o, warmup_steps=4), 16)
    assert found[:4] == [0.25, 0.5, 0.75, 1]
    assert found[8] == pytest.approx(2 / 3) and found[15] == pytest.approx(0.5)
    assert rates(lambda o: WarmupInverseSquareRoot(o, warmup_steps=0), 4) == pytest.approx([1, 0.5**0.5, 3**-0.5, 0.5])
