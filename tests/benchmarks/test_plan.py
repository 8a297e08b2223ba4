"""A plan against measured steps: which ways are compared, and what the verdict says."""

import dataclasses

import pytest
from plan_jobs import FREE

from d2v_scale.benchmarks import plan
from d2v_scale.planning.costs import Rate


def test_twelve_ways_in_threes_of_which_each_recipe_has_the_same_batch() -> None:
    assert len(plan.POINTS) == 12
    assert max(ranks for ranks, _ in plan.POINTS.values()) == 2
    batches: dict[str, set[int]] = {}
    for ranks, work in plan.POINTS.values():
        recipe = work.planned(ranks)
        recipe.check(ranks)
        batches.setdefault(work.recipe, set()).add(recipe.global_batch_size)
    assert [len(each) for each in batches.values()] == [1, 1, 1]
    launches = plan.launches(list(plan.POINTS))
    assert sorted(launches) == [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1)]


@pytest.mark.usefixtures("world_of_one")
def test_every_way_is_estimated() -> None:
    """On a device of which only products take time: two ranks take half, recomputation adds a forward pass."""
    rate = Rate(widths=(1,), flops=(1e9,))
    costs = dataclasses.replace(FREE, blocks=rate, others=rate, waits=True, precision="fp32")
    found = {name: plan.estimate(*plan.POINTS[name], costs) for name in plan.POINTS}
    assert found["text, ZeRO-1"] == pytest.approx(found["text, 1 rank"] / 2, rel=1e-6)
    again = "images, 1 rank, recomputed, 4 micro-batches"
    assert 1.02 < found[again] / found["images, 1 rank"] < 1.35
    assert found["text, 1 rank"] / 2 < found["text, tensor"] < found["text, 1 rank"]
    assert found["images, 1 rank"] / 2 < found["images, pipeline"] < found["images, 1 rank"]


def test_the_verdict_counts_ratios_and_the_pairs_that_matter() -> None:
    measured = {"text, 1 rank": 4.0, "text, ZeRO-1": 2.0, "text, tensor": 2.2, "images, 1 rank": 1.0}
    planned = {"text, 1 rank": 40.0, "text, ZeRO-1": 50.0, "text, tensor": 22.0, "images, 1 rank": 10.0}
    lines = list(plan.compared(planned, measured))
    assert [word for word in lines[1].split() if word[0].isdigit()] == ["1.25", "0.50", "2.50x"]
    # Three pairs without the wrong one agree, and three with it are off by 150 %.
    assert "6 pairs: median error 75%, largest 150%" in lines[4]
    # ZeRO-1 and tensor parallelism differ by 10 % only.
    assert "named in 1 of 2 pairs" in lines[5]
    assert lines[6:] == ["text, 1 rank against text, ZeRO-1: 0.80 estimated, 2.00 measured"]
