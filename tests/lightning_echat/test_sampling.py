"""Choosing ids from logits: cuts, random numbers of one's own, and control of repetition."""

import pytest
import torch

from lightning_echat.contracts import UserError
from lightning_echat.sampling import RepetitionWindow, SamplingConfig, choose, uniforms_of

CPU = torch.device("cpu")


def drawn(logits: list[float], config: SamplingConfig, *, draws: int = 4000) -> torch.Tensor:
    """How often each id is drawn, as shares."""
    uniforms = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    ids = choose(torch.tensor(logits).expand(draws, -1), config, uniforms)
    return torch.bincount(ids, minlength=len(logits)) / draws


def test_temperature_0_takes_the_best_and_needs_no_random_numbers():
    assert choose(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), SamplingConfig()).tolist() == [1, 0]
    with pytest.raises(ValueError, match="random numbers"):
        choose(torch.zeros(1, 3), SamplingConfig(temperature=1.0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_are_drawn_as_often_as_their_probability_says(temperature):
    logits = [0.0, 1.0, -1.0, 0.5]
    expected = (torch.tensor(logits) / temperature).softmax(0)
    assert torch.allclose(drawn(logits, SamplingConfig(temperature=temperature)), expected, atol=1e-3)


def test_top_k_draws_among_the_best_k():
    shares = drawn([0.1 * n for n in range(10)], SamplingConfig(temperature=5.0, top_k=3))
    assert shares.nonzero()[:, 0].tolist() == [7, 8, 9]


def test_top_p_draws_among_the_fewest_that_hold_p_and_keeps_their_proportions():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert drawn(logits, SamplingConfig(temperature=1.0, top_p=0.79)).tolist() == pytest.approx(
        [0.625, 0.375, 0, 0], abs=1e-3
    )
    assert drawn(logits, SamplingConfig(temperature=1.0, top_p=0.81)).nonzero().numel() == 3
    assert drawn(logits, SamplingConfig(temperature=1.0, top_p=1e-9)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_an_id_without_probability_is_never_drawn(uniform):
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 2] = 0.0
    assert choose(logits, SamplingConfig(temperature=1.0), torch.tensor([uniform], dtype=torch.float64)).tolist() == [2]


def test_random_numbers_follow_from_seed_and_key_alone():
    three = uniforms_of(["a", "b", "c"], seed=1, steps=50)
    torch.manual_seed(5)
    assert torch.equal(uniforms_of(["c", "a"], seed=1, steps=50), three[[2, 0]])
    assert not torch.equal(uniforms_of(["a"], seed=2, steps=50), three[:1])
    assert len(three.unique()) == 150 and three.min() >= 0 and three.max() < 1
    assert 0.4 < float(three.mean()) < 0.6


def test_recent_ids_of_the_same_row_become_less_likely():
    config = SamplingConfig(repetition_penalty=2.0, repetition_window=2)
    window = RepetitionWindow(3, config, exempt=[3], device=CPU)
    logits = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    row, other = torch.tensor([2]), torch.tensor([0])
    for id in (0, 1, 3):
        window.add(torch.tensor([id]), row)
    # 0 has left the window of two, 1 is below zero, 3 is exempt.
    assert window.penalise(logits, row).tolist() == [[1.0, -2.0, 1.0, 1.0]]
    window.add(torch.tensor([2]), row)
    assert window.penalise(logits, row).tolist() == [[1.0, -1.0, 0.5, 1.0]]
    assert torch.equal(window.penalise(logits, other), logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.5},
        {"repetition_window": 0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingConfig(**options)
