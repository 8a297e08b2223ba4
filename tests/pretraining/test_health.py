"""Warnings first, a verdict after the patience, and never before the reference's 5000 updates."""

import pytest

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.pretraining.health import HealthMonitor
from d2v_scale.shards.plan import Mixture

HEALTHY = {"target_std": 0.9, "prediction_std": 0.5, "teacher_update_norm": 0.1}


def test_collapse_is_a_warning_first_and_a_verdict_after_the_patience():
    monitor = HealthMonitor(HealthConfig(after=10, patience=3))
    low = HEALTHY | {"target_std": 0.05}
    assert monitor.observe(low, 10, 0.999) == []
    for _ in range(2):
        assert len(monitor.observe(low, 11, 0.999)) == 1
        assert not monitor.collapsed
    monitor.observe(low, 13, 0.999)
    assert monitor.collapsed


def test_one_healthy_point_resets_the_patience():
    monitor = HealthMonitor(HealthConfig(after=0, patience=2))
    monitor.observe(HEALTHY | {"prediction_std": 0.0}, 1, 0.999)
    monitor.observe(HEALTHY, 2, 0.999)
    monitor.observe(HEALTHY | {"prediction_std": float("nan")}, 3, 0.999)
    assert not monitor.collapsed


def test_a_teacher_that_stands_still_is_noticed_unless_it_is_frozen_on_purpose():
    monitor = HealthMonitor(HealthConfig(patience=1))
    still = HEALTHY | {"teacher_update_norm": 0.0}
    assert monitor.observe(still, 5, 1.0) == []
    assert monitor.observe(still, 5, 0.999) != []
    assert monitor.collapsed


def noticed_after(weights: list[float], collapsed: int, log_every: int = 10) -> int:
    """Steps until the verdict, where a source collapses that is one of a mixture, as `RunObserver` measures it."""
    mixture = Mixture(weights, 1.0, seed=1)
    monitor = HealthMonitor(HealthConfig())
    latest: dict[str, float] = {}
    measured: set[str] = set()
    for step in range(200_000):
        source = mixture.source_of(step)
        logged = (step + 1) % log_every == 0
        if logged or str(source) not in measured:
            measured.add(str(source))
            latest[f"target_std/{source}"] = 0.01 if source == collapsed else 0.9
        if logged:
            # The figure of all sources is that of the step that was logged.
            monitor.observe({"target_std": latest[f"target_std/{source}"], **latest}, step + 1, 0.999, measured)
            measured = set()
            if monitor.collapsed:
                return step + 1
    raise AssertionError("never noticed")


@pytest.mark.parametrize("weights", [[20.0, 1.0], [100.0, 5.0, 1.0], [1.0, 1.0]])
def test_a_collapsed_modality_of_a_mixture_is_noticed_nearly_as_soon_as_one_that_is_alone(weights: list[float]) -> None:
    """At 20 to 1 it took 40,950 steps: only log points counted that fell on its step, and others in between excused
    it."""
    alone = noticed_after([1.0], 0)
    assert alone == 5030
    rare = len(weights) - 1
    every = sum(weights) / weights[rare]
    assert noticed_after(weights, rare) <= alone + 12 * every
    assert noticed_after(weights, 0) <= alone + 30


def test_a_source_is_judged_only_by_its_own_steps_and_healthy_ones_reset_its_patience() -> None:
    monitor = HealthMonitor(HealthConfig(after=0, patience=2))
    figures = {"target_std": 0.01, "target_std/a": 0.01, "target_std/b": 0.9}
    [sign] = monitor.observe(figures, 1, 0.999, {"a", "b"})
    assert sign == "target_std/a is 0.01, below 0.1: the representations of a collapse"
    # Its figure stands in the record, but it is no new one.
    assert monitor.observe(figures, 2, 0.999, {"b"}) == []
    assert monitor.unhealthy == {"target_std/a": 1}
    monitor.observe(figures | {"target_std/a": 0.5}, 3, 0.999, {"a"})
    assert monitor.unhealthy == {}
    monitor.observe(figures, 4, 0.999, {"a"})
    monitor.observe(figures, 5, 0.999, set())
    assert not monitor.collapsed
    monitor.observe(figures, 6, 0.999, {"a"})
    assert monitor.collapsed
