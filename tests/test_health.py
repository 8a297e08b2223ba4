"""Warnings first, a verdict after the patience, and never before the reference's 5000 updates."""

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.health import HealthMonitor

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
