"""The rule by which a step is a spike."""

import math
import random

import pytest

from d2v_scale.errors import ConfigError
from d2v_scale.spikes import SpikeConfig, SpikeRule


def rule(**settings: float) -> SpikeRule:
    return SpikeRule(SpikeConfig(on_spike="skip", **settings))  # type: ignore[arg-type]


def test_a_norm_far_above_those_before_is_a_spike_and_does_not_change_the_rule() -> None:
    judge = rule(factor=10, window=20, after=4)
    assert [judge.judge(norm, 1.0) for norm in (1.0, 1.2, 0.9, 1.1)] == [None] * 4
    # Median 1.05, deviations 0.05, 0.15, 0.15, 0.05: the limit is 1.05 + 10 x 0.1.
    for _ in range(3):
        spike = judge.judge(2.06, 1.0)
        assert spike is not None
        assert (spike.median, spike.known) == (1.05, 4)
        assert spike.limit == pytest.approx(2.05)
        assert "2.06, above 2.05 (the median of the last 4 is 1.05)" in str(spike)
    assert judge.judge(2.04, 1.0) is None


def test_a_loss_far_above_those_before_is_a_spike_though_the_norm_is_as_ever() -> None:
    judge = rule(factor=10, window=20, after=4)
    for loss in (-1.0, -1.2, -0.9, -1.1):  # that of states which are spread out is negative
        assert judge.judge(5.0, loss) is None
    spike = judge.judge(5.0, 0.0)
    assert spike is not None
    assert (spike.of, spike.norm, spike.loss, spike.median) == ("loss", 5.0, 0.0, -1.05)
    assert "its loss is 0, above -0.05 (the median of the last 4 is -1.05)" in str(spike)
    assert judge.judge(5.0, -0.06) is None
    norm = judge.judge(9.0, 99.0)
    assert norm is not None
    assert norm.of == "gradient norm"


def test_a_checkpoint_of_an_earlier_version_has_norms_alone() -> None:
    judge = rule(after=3)
    judge.load_state_dict({"": [1.0, 1.0, 1.0]})
    assert judge.judge(9.0, 1.0) is not None
    assert [judge.judge(1.0, loss) for loss in (1.0, 9.0, 1.0)] == [None] * 3
    assert judge.judge(1.0, 30.0) is not None


def test_a_rarer_source_is_judged_among_its_own_norms() -> None:
    """One window for all called every step of the rarer one a spike, up to its exclusion."""
    judge, other = rule(factor=5, window=20, after=4), rule(factor=5, window=20, after=4)
    for step in range(60):
        judge.read, norm = ("speech", 9.0) if step % 10 == 9 else ("vision", 1.0)
        assert judge.judge(norm + 0.01 * (step % 3), 1.0) is None
    other.load_state_dict(judge.state_dict())
    for one in (judge, other):
        one.read = "vision"
        assert one.judge(9.0, 1.0) is not None
        one.read = "speech"
        assert one.judge(9.0, 1.0) is None


def test_more_steps_than_a_run_remembers_are_not_promised() -> None:
    SpikeConfig(leave_out=1000).check()
    with pytest.raises(ConfigError, match=r"optim\.spikes\.leave_out: is 1001"):
        SpikeConfig(leave_out=1001).check()


def test_nothing_is_a_spike_before_enough_is_known() -> None:
    judge = rule(after=50)
    assert all(judge.judge(10.0**step, 1.0) is None for step in range(50))


def test_norms_that_hardly_differ_make_no_spike_of_the_next() -> None:
    judge = rule(factor=20, after=5)
    assert all(judge.judge(1.0, 1.0) is None for _ in range(9))
    assert judge.judge(1.39, 1.0) is None
    assert judge.judge(1.41, 1.0) is not None


def test_what_is_not_finite_is_skipped_for_itself() -> None:
    judge = rule(after=2)
    assert [judge.judge(norm, 1.0) for norm in (1.0, math.inf, math.nan)] == [None] * 3
    assert [judge.judge(1.0, loss) for loss in (math.inf, math.nan)] == [None] * 2
    assert judge.state_dict() == {"": {"gradient norm": [1.0], "loss": [1.0]}}


def test_a_healthy_run_has_none_in_ten_thousand_steps_and_every_spike_is_found() -> None:
    for seed in range(5):
        chance = random.Random(seed)
        judge, level = rule(), 5.0
        for step in range(2000):
            level = max(0.2, level * (0.999 if step > 100 else 0.98))
            assert judge.judge(level * math.exp(chance.gauss(0, 0.15)), 1.0) is None, step
            if step > 400 and step % 97 == 0:
                assert judge.judge(level * 10, 1.0) is not None, step


def test_a_rule_goes_on_where_the_checkpoint_was() -> None:
    first, second = rule(window=6, after=3), rule(window=6, after=3)
    for norm in (1.0, 2.0, 3.0, 2.5, 2.2, 1.9, 2.1):
        first.judge(norm, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.judge(99.0, 1.0) == first.judge(99.0, 1.0)
    second.load_state_dict(None)
    assert second.judge(99.0, 1.0) is None


def test_a_rule_that_could_never_be_applied_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.spikes\.after"):
        SpikeConfig(after=300, window=200).check()
