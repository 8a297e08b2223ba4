"""Which rank is named as the one that the others wait for, and when nobody is."""

import json
import math
import random
from pathlib import Path

import pytest

from d2v_scale.tracking.stragglers import PATIENCE, Pace, Straggler, StragglerDetector
from d2v_scale.tracking.summary import _incidents

TIMELINES = Path(__file__).with_name("timelines")
EVERY = 4
"""Steps between measurements."""


def step(chance: random.Random, ranks: int, noise: float, **slow: float) -> list[Pace]:
    """A synchronous step: everybody waits for the slowest. `slow`: seconds more of rank 1."""
    own = [[0.01 * math.exp(chance.gauss(0, 1)), 0.4 * math.exp(chance.gauss(0, noise))] for _ in range(ranks)]
    own[1][0] += slow.get("data", 0.0)
    own[1][1] += slow.get("compute", 0.0)
    longest = max(map(sum, own))
    return [Pace(data, compute, 0.05 + longest - data - compute) for data, compute in own]


@pytest.mark.parametrize(("kind", "words"), [("data", "data"), ("compute", "its own computation")])
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_a_slow_rank_is_named_once_with_what_it_waits_for(kind: str, words: str, ranks: int) -> None:
    chance, detector = random.Random(ranks), StragglerDetector(2.0)
    for _ in range(20):
        assert detector.observe(step(chance, ranks, 0.1)) == []
    named = [detector.observe(step(chance, ranks, 0.1, **{kind: 0.9})) for _ in range(12)]
    assert [len(found) for found in named] == [0] * (PATIENCE - 1) + [1] + [0] * (12 - PATIENCE)
    [one] = named[PATIENCE - 1]
    assert (one.rank, one.waits_for) == (1, words)
    assert one.seconds > 2 * one.others
    assert f"rank 1 is {one.seconds / one.others:.1f} times as slow as its peers, waiting for {words}" in str(one)
    # It recovers, and is named again when it falls back.
    assert detector.observe(step(chance, ranks, 0.1)) == []
    again = [detector.observe(step(chance, ranks, 0.1, **{kind: 0.9})) for _ in range(PATIENCE)]
    assert [len(found) for found in again] == [0] * (PATIENCE - 1) + [1]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_named_in_two_thousand_healthy_steps(seed: int) -> None:
    chance, detector = random.Random(seed), StragglerDetector(2.0)
    for number in range(2000 // EVERY):
        # Every tenth measurement something holds a random rank up for a moment: that is nobody's fault.
        hiccup = {"compute": chance.uniform(0, 3)} if number % 10 == 0 else {}
        assert detector.observe(step(chance, 8, 0.15, **hiccup)) == [], number


def test_what_costs_the_others_next_to_nothing_is_not_named() -> None:
    detector = StragglerDetector(2.0)
    for _ in range(9):
        assert detector.observe([Pace(0.0, 0.01, 0.99), Pace(0.0, 0.05, 0.95)]) == []


def test_stages_of_a_pipeline_do_different_work() -> None:
    detector = StragglerDetector(2.0)
    stages = [Pace(0.0, 0.1, 0.9, stage=0), Pace(0.0, 1.0, 0.1, stage=1)]
    for _ in range(9):
        assert detector.observe(stages) == []
        assert detector.observe(stages * 2) == []
    slow = [*stages, Pace(0.0, 0.4, 0.8, stage=0), stages[1]]
    assert [[one.rank for one in detector.observe(slow)] for _ in range(PATIENCE)][-1] == [2]


def recorded(name: str) -> list[list[Pace]]:
    lines = [json.loads(line) for line in (TIMELINES / name).read_text().splitlines()]
    return [
        [Pace(*row) for row in zip(*(line[k] for k in ("data", "compute", "communication")), strict=True)]
        for line in lines
    ]


def test_a_recorded_run_whose_rank_was_delayed_names_it() -> None:
    """Two ranks on CPUs; from its tenth step on rank 1 sleeps before each."""
    detector = StragglerDetector(2.0)
    named = [detector.observe(paces) for paces in recorded("delayed_rank.jsonl")]
    assert [[(one.rank, one.waits_for) for one in found] for found in named[:5]] == [
        *([], [], [], []),
        [(1, "its own computation")],
    ]
    assert not any(named[5:])


def test_recorded_healthy_runs_name_nobody() -> None:
    """Two ranks on two processors that other programs were using, too."""
    timeline, detector = recorded("healthy_ranks.jsonl"), StragglerDetector(2.0)
    assert len(timeline) > 50
    assert [found for paces in timeline if (found := detector.observe(paces))] == []
    # Nor in two thousand steps like these, in whatever order they come.
    for seed in range(20):
        chance, detector = random.Random(seed), StragglerDetector(2.0)
        assert not any(detector.observe(chance.choice(timeline)) for _ in range(2000 // EVERY))


def test_a_straggler_is_an_incident_of_its_run(tmp_path: Path) -> None:
    line = {"time": 5.0, "step": 8, **vars(Straggler(1, "data", 2.0, 0.5))}
    (tmp_path / "stragglers.jsonl").write_text(json.dumps(line) + "\n")
    [incident] = _incidents(tmp_path, [], [], None)
    assert (incident.step, incident.what) == (8, "rank 1 held the others up, waiting for data")
