"""What a calibration measures, and what it makes of it."""

import dataclasses
import os
from typing import Any

import pytest

from d2v_scale.benchmarks import calibrate
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.planning import hardware
from d2v_scale.planning.costs import assumed


def test_more_ranks_than_the_machine_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"this machine has .* 1 to") as error:
        calibrate.calibrate(10_000, hardware.H100)
    assert error.value.key == "gpus"


def test_a_machine_is_measured_in_the_recipes_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(calibrate, "on_ranks", lambda *given: asked.append(given) or {})
    monkeypatch.setattr(calibrate, "costs_of", lambda *_: assumed(hardware.H100, 0.4))
    calibrate.calibrate(1, hardware.H100, 3, "bf16")
    assert asked == [(1, "d2v_scale.benchmarks.calibrate", "3", "bf16")]
    work = calibrate.Work(precision="bf16")
    assert work.planned(1).precision == "bf16"


@pytest.mark.slow
def test_this_machine_is_measured() -> None:
    """One rank, few steps: every figure is there."""
    found = calibrate.calibrate(min(2, os.cpu_count() or 1), hardware.H100, rounds=3).costs
    assert found.waits is (found.precision == "fp32")
    assert found.zero_1.update_rate > 1e6
    assert found.blocks.widths == found.others.widths
    assert min(*found.blocks.flops, *found.others.flops) > 1e6


def test_costs_are_found_in_what_was_measured() -> None:
    """Steps made of known costs: the differences between them are those."""
    layer, micro, step, rate = 2e-3, 10e-3, 5e-3, 4.8e9

    def tiny(depth: int, micro_batches: int, elements: int) -> float:
        return step + micro_batches * (micro + depth * layer) + 48 * elements / rate

    seconds = [tiny(2, 1, 0), tiny(6, 1, 0), tiny(2, 4, 0), tiny(2, 1, 2_560_000)]
    sizes = {"width": 64, "block_flops": 3e9, "other_flops": 8e9, "block_elements": 10**6, "other_elements": 10**6}

    def large(depth: int) -> float:
        return tiny(depth, 1, (depth + 1) * 10**6) + depth * 3e9 / 50e9 + 8e9 / 40e9

    alone: dict[str, Any] = {
        "device": "cpu",
        "precision": "fp32",
        "tiny": {"1": seconds, "3": [2 * one for one in seconds]},
        "rows": 2_560_000,
        "products": [{**sizes, "seconds": [large(2), large(6)]}],
    }
    together = {
        "latencies": [(1, 130e-6), (2, 160e-6)],
        "link": 1e9,
        "crowded": 1.2,
        "micro": layer + micro / 2 + 2 * 400e-6,
    }
    found = calibrate.costs_of(alone, together, assumed(hardware.H100, 0.4), "h100")
    assert dataclasses.astuple(found.zero_1) == pytest.approx((step, micro, layer, rate))
    assert found.zero_3.layer == pytest.approx(2 * layer)
    assert found.blocks.at(64) == pytest.approx(50e9)
    assert found.others.at(64) == pytest.approx(40e9)
    assert (found.ring.start, found.ring.link_step) == (pytest.approx(100e-6), pytest.approx(30e-6))
    assert (found.hop, found.crowded, found.link, found.waits) == (pytest.approx(400e-6), 1.2, 1e9, True)
    assert (found.precision, found.network) == ("fp32", 50e9 * hardware.BANDWIDTH_REACHED)
    alone["products"][0]["seconds"].reverse()
    with pytest.raises(UserError, match="busy"):
        calibrate.costs_of(alone, together, assumed(hardware.H100, 0.4), "h100")
    alone["products"][0]["seconds"].reverse()
    alone_only = calibrate.costs_of(alone, {}, assumed(hardware.H100, 0.4), "h100")
    assert alone_only.link == 450e9 * hardware.BANDWIDTH_REACHED
    assert "links, too" in alone_only.source
