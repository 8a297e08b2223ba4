"""Bounds hold what they promise, and see what is there."""

import pytest
import torch

from d2v_scale.alignment.verdict import compared

N = 200


def hits(rate: float, repeats: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(repeats, N, generator=generator) < rate).double()


@pytest.mark.parametrize(("runs", "repeats"), [(1, 1), (1, 5), (3, 5), (2, 20)])
def test_equal_rates_are_rarely_told_apart(runs: int, repeats: int) -> None:
    false = sum(compared(hits(0.1, runs, 2 * k), hits(0.1, repeats, 2 * k + 1), 1).above for k in range(200))
    assert false <= 18  # 5 % of 200, and three standard deviations


def test_encoders_that_differ_by_their_seed_are_rarely_above_others() -> None:
    """Concepts alone would say of every second run that it is above: the spread over seeds is greater."""
    false = 0
    for k in range(200):
        rates = 0.3 + 0.1 * torch.randn(6, generator=torch.Generator().manual_seed(k))
        values = torch.cat([hits(float(rate), 1, 1000 * k + n) for n, rate in enumerate(rates)])
        false += compared(values[:1], values[1:], 1).above
    assert false <= 18


@pytest.mark.parametrize(("runs", "repeats"), [(1, 1), (1, 5), (3, 5)])
def test_a_clear_difference_is_seen_among_many_comparisons(runs: int, repeats: int) -> None:
    found = compared(hits(0.35, runs, 1), hits(0.1, repeats, 2), 80)
    assert found.above
    assert 0 < found.lower_bound < found.difference
    assert compared(hits(0.35, runs, 1), hits(0.1, repeats, 2), 8).lower_bound > found.lower_bound


def test_no_difference_at_all_is_not_above_and_a_perfect_one_is() -> None:
    same = torch.ones(3, N)
    assert not compared(same, same, 10).above
    assert compared(same, torch.zeros(1, N), 10).above
