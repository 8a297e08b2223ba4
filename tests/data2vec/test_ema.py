import math

import pytest
import torch

from d2v_scale.data2vec.config import EmaConfig
from d2v_scale.data2vec.ema import average_, decay, is_frozen

# Values recorded from the reference at numbers of completed updates.
RECORDED = [
    (0.9, 0.99, 3, {1: 0.93, 2: 0.96, 3: 0.99, 4: 0.99, 1000: 0.99}),
    (0.999, 0.9999, 30000, {1: 0.99900003, 7500: 0.999225, 15000: 0.99945, 29999: 0.99989997, 30001: 0.9999}),
    (0.999, 0.99999, 75000, {1: 0.9990000132, 1000: 0.9990132, 37500: 0.999495, 75000: 0.99999}),
    (0.9998, 0.99999, 100000, {10: 0.999800019, 50000: 0.999895, 100001: 0.99999}),
    (0.9997, 1.0, 300000, {150000: 0.99985, 299999: 0.999999999, 300000: 1.0}),
]


@pytest.mark.parametrize(("start", "end", "steps", "values"), RECORDED)
def test_schedule_equals_the_recorded_one(start: float, end: float, steps: int, values: dict[int, float]) -> None:
    config = EmaConfig(start=start, end=end, anneal_steps=steps)
    for completed, expected in values.items():
        assert decay(config, completed) == pytest.approx(expected, abs=1e-12)


def test_zero_based_index_starts_at_the_start_value() -> None:
    config = EmaConfig(start=0.9, end=0.99, anneal_steps=3, index="zero_based")
    assert [decay(config, n) for n in (1, 2, 3, 4)] == pytest.approx([0.90, 0.93, 0.96, 0.99])


def test_constant_decay_needs_no_annealing() -> None:
    assert decay(EmaConfig(start=0.9998, end=0.9998, anneal_steps=0), 1) == 0.9998


def test_acceptance_5_distance_to_a_constant_student_shrinks_by_the_product_of_decays() -> None:
    config = EmaConfig(start=0.9, end=0.99, anneal_steps=10)
    teacher, student = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for n in range(1, 21):
        average_([teacher], [student], decay(config, n))
    expected = math.prod(decay(config, n) for n in range(1, 21))
    torch.testing.assert_close(teacher, torch.full((4,), expected, dtype=torch.float64))


def test_acceptance_5_a_decay_of_one_freezes() -> None:
    config = EmaConfig(start=0.9997, end=1.0, anneal_steps=300000)
    assert not is_frozen(decay(config, 299999))
    assert is_frozen(decay(config, 300000))


def test_the_average_of_a_bf16_student_is_kept_in_fp32() -> None:
    teacher = torch.zeros(1)
    for _ in range(5000):
        average_([teacher], [torch.ones(1, dtype=torch.bfloat16)], 0.9998)
    assert float(teacher) == pytest.approx(1 - 0.9998**5000, rel=1e-3)
