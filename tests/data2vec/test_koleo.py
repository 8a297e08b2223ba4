"""d2v_scale.data2vec.koleo: rows of different samples are kept apart."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2v_scale.data2vec.koleo import koleo_sum


def by_loops(states: torch.Tensor, clones: int, group: int, present: list[bool]) -> float:
    """The formula, row by row."""
    unit = states.double() / states.double().norm(dim=1, keepdim=True)
    total = 0.0
    samples = len(states) // clones
    for sample in range(samples):
        first = sample - sample % group
        others = [
            k for k in range(first, min(first + group, samples)) if k != sample and present[k] and present[sample]
        ]
        for clone in range(clones):
            apart = [float((unit[sample * clones + clone] - unit[k * clones + clone]).norm()) for k in others]
            total -= math.log(min(apart)) if apart else 0.0
    return total


@given(
    samples=st.integers(0, 9),
    clones=st.integers(1, 3),
    group=st.integers(2, 5),
    absent=st.sets(st.integers(0, 8)),
    seed=st.integers(0, 1000),
)
def test_it_is_the_formula(samples: int, clones: int, group: int, absent: set[int], seed: int) -> None:
    states_rd = torch.randn(samples * clones, 6, generator=torch.Generator().manual_seed(seed))
    present = [number not in absent for number in range(samples)]
    found = koleo_sum(states_rd, clones, group, torch.tensor(present, dtype=torch.bool) if absent else None)
    assert float(found) == pytest.approx(by_loops(states_rd, clones, group, present), abs=1e-4)


def test_whole_groups_add_up_over_micro_batches() -> None:
    states_rd = torch.randn(24, 5)
    whole = koleo_sum(states_rd, 2, 4)
    parts = koleo_sum(states_rd[:8], 2, 4) + koleo_sum(states_rd[8:], 2, 4)
    torch.testing.assert_close(whole, parts)


def test_its_gradient_is_that_of_small_differences() -> None:
    states_rd = torch.randn(6, 4, dtype=torch.float64).mul(3).requires_grad_()
    (gradient,) = torch.autograd.grad(koleo_sum(states_rd, 1, 3), states_rd)
    step = 1e-3
    for row, channel in ((0, 0), (3, 2), (5, 3)):
        moved = torch.zeros_like(states_rd)
        moved[row, channel] = step
        difference = koleo_sum(states_rd + moved, 1, 3) - koleo_sum(states_rd - moved, 1, 3)
        assert float(gradient[row, channel]) == pytest.approx(float(difference) / (2 * step), abs=5e-3)


def test_neighbours_are_pushed_apart() -> None:
    states_rd = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    koleo_sum(states_rd, 1, 3).backward()
    gradient = states_rd.grad
    assert gradient is not None
    assert gradient[0, 1] > 0 > gradient[1, 1]  # of a descent: the first goes down, the second up


def test_states_that_are_alike_have_a_finite_gradient() -> None:
    states_rd = torch.ones(4, 3, requires_grad=True)
    value = koleo_sum(states_rd, 1, 4)
    value.backward()
    assert math.isfinite(float(value))
    assert states_rd.grad is not None
    assert bool(states_rd.grad.isfinite().all())
