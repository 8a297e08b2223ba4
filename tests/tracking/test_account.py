"""Where a run's time went: named second by second, from the lines of its timeline."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from d2v_scale.process.started import started
from d2v_scale.process.status import write_status
from d2v_scale.tracking import RunTracker, SpeedMeter, TrackingConfig, timeline
from d2v_scale.tracking.account import KINDS, account, account_table, read_account, rows, told, totals
from d2v_scale.tracking.timeline import TIMELINE_FILE, Timeline

KILLED = Path(__file__).with_name("timelines") / "killed.jsonl"
"""Of a run of 60 steps on one process that saved every 16, was killed after step 30 and started again at once."""


def begin(time: float, started: float, resumed: int = 0, restart: int = 0, allocated: float | None = None) -> dict:
    return {
        "event": "begin",
        "time": time,
        "started": started,
        "resumed": resumed,
        "restart": restart,
        "allocated": allocated,
    }


def at(time: float, step: int, **spent: float) -> dict[str, Any]:
    return {"event": "at", "time": time, "step": step, "spent": spent}


def end(time: float, code: int = 0) -> dict[str, Any]:
    return {"event": "end", "time": time, "code": code}


def named(seconds: dict[str, float]) -> dict[str, float]:
    return {kind: round(value, 6) for kind, value in seconds.items() if value}


def test_every_second_of_a_run_has_its_name() -> None:
    lines = [
        *(begin(20, 10), at(35, 1, evaluation=5, data=4), at(55, 21, evaluation=5, data=6)),
        *(at(65, 21, evaluation=5, data=6, checkpoint=8), end(66)),
    ]
    [one] = account(lines)
    # Until the first step 25 s, of which 5 measured; then 20 s with 2 of waiting; then a checkpoint of 8 and the end.
    expected = {"start_up": 20, "evaluation": 5, "productive": 18, "data": 2, "checkpoint": 8, "ending": 3}
    assert named(one.seconds) == expected
    assert (one.first, one.last, one.code, one.wall) == (0, 21, 0, 56)


def test_what_is_done_again_was_not_productive() -> None:
    lines = [
        *(begin(1, 0), at(2, 1), at(12, 11), at(13, 11, checkpoint=1), at(23, 21, checkpoint=1)),
        *(begin(33, 30, resumed=11, restart=1), at(34, 12), at(44, 22), end(45)),
    ]
    first, second = account(lines)
    assert named(first.seconds) == {"start_up": 2, "productive": 10, "checkpoint": 1, "repeated": 10}
    assert named(second.seconds) == {"restart": 7, "start_up": 4, "productive": 10, "ending": 1}
    # A third attempt from before all of it takes the second's and the first's work.
    third = account([*lines, begin(50, 50, resumed=0), at(51, 1)])
    assert [one.seconds["productive"] for one in third] == [0, 0, 0]
    assert sum(one.seconds["repeated"] for one in third) == 30
    # Where no line lies at the step of the checkpoint, time is divided by steps.
    divided = account([begin(1, 0), at(2, 1), at(12, 11), begin(12, 12, resumed=6, restart=1)])
    assert named(divided[0].seconds) == {"start_up": 2, "productive": 5, "repeated": 5}


def test_an_attempt_that_fails_before_its_first_step_has_started_in_vain() -> None:
    [one] = account([begin(30, 10), end(40, 1)])
    assert (named(one.seconds), one.code) == ({"start_up": 30}, 1)


def test_a_rewind_repeats_within_an_attempt() -> None:
    back = {"event": "rewound", "time": 14, "step": 5}
    [one] = account([begin(1, 0), at(2, 1), at(6, 5), at(12, 11), back, at(18, 9), end(18)])
    assert named(one.seconds) == {"start_up": 2, "productive": 8, "repeated": 6, "restart": 2}


def test_what_a_rewind_takes_back_was_repeated_and_going_back_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run writes it: the spike's step, then waiting for the writer and reading the checkpoint, were `ending`."""
    clock = [1.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(timeline, "started", lambda: 0.0)
    tracker = RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    for step in range(1, 9):
        clock[0] += 2
        tracker.spent(step, {})
    clock[0] += 2
    tracker.rewinds(9, {})
    clock[0] += 5
    tracker.rewound(6)
    for step in range(7, 11):
        clock[0] += 2
        tracker.spent(step, {})
    [one] = read_account(tmp_path)
    assert named(one.seconds) == {"start_up": 3, "productive": 10 + 8, "repeated": 6, "restart": 5}


@pytest.mark.parametrize(
    ("next_begin", "decided", "expected"),
    [
        (begin(60, 50, restart=1), [], {"restart": 40}),  # the launcher started the ranks again
        (begin(60, 50), [], {"held": 40}),  # by hand
        (begin(60, 50, allocated=45), [15], {"restart": 5 + 5, "held": 30}),  # requeued by the job's script
        (begin(60, 50, allocated=45), [], {"held": 35, "restart": 5}),  # a lost node: Slurm requeued it by itself
        (begin(60, 50, allocated=2), [15], {"restart": 40}),  # the script started the training again
        (begin(60, 50, allocated=2), [], {"held": 40}),
        (begin(60, 50), [15], {"restart": 5, "held": 35}),  # a launcher gave up; somebody started it by hand
    ],
)
def test_time_between_attempts_is_held_or_restart(
    next_begin: dict[str, Any], decided: list[float], expected: dict[str, float]
) -> None:
    attempts = account([begin(1, 0, allocated=-5), at(2, 1), at(10, 9), next_begin], decided)
    assert named(attempts[1].seconds) == expected


def test_a_hang_is_paid_for_until_the_watchdog_has_spoken(tmp_path: Path) -> None:
    lines = [begin(1, 0), at(2, 1), at(10, 9)]
    (tmp_path / TIMELINE_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert named(totals(read_account(tmp_path))) == {"start_up": 2, "productive": 8}
    write_status(tmp_path, 10, "all ranks live but wait")
    [one] = read_account(tmp_path)
    assert one.seconds["restart"] == pytest.approx(time.time() - 10, abs=60)


@pytest.mark.parametrize("seed", range(50))
def test_names_sum_to_wall_time_whatever_happened(seed: int) -> None:
    chance = random.Random(seed)
    lines: list[dict[str, Any]] = []
    now, saved = 0.0, 0
    for number in range(chance.randint(1, 6)):
        launched = now + (chance.uniform(0, 50) if number else 0)
        now = launched + chance.uniform(0, 9)
        lines.append(begin(now, launched, saved, chance.randint(0, 1), chance.choice([None, launched - 1])))
        spent, step = dict.fromkeys(("data", "evaluation", "checkpoint"), 0.0), saved
        for _ in range(chance.randint(0, 9)):
            kind, held_up = chance.choice(list(spent)), chance.uniform(0, 3)
            spent[kind] += held_up
            now += held_up + chance.uniform(0, 3)
            step += chance.randint(0, 4)
            saved = step if kind == "checkpoint" else saved
            lines.append(at(now, step, **spent))
            if chance.random() < 0.1 and step > saved:
                now, step = now + 1, saved
                lines.append({"event": "rewound", "time": now, "step": step})
        if chance.random() < 0.5:
            now += chance.uniform(0, 2)
            lines.append(end(now))
    attempts = account(lines, [chance.uniform(0, now) for _ in range(3)])
    assert sum(one.wall for one in attempts) == pytest.approx(now)
    assert min(value for one in attempts for value in one.seconds.values()) > -1e-9
    assert {kind for one in attempts for kind in one.seconds} == set(KINDS)


def test_a_recorded_run_that_was_killed_is_accounted_for() -> None:
    lines = [json.loads(line) for line in KILLED.read_text().splitlines()]
    first, second = account(lines)
    assert first.wall + second.wall == pytest.approx(lines[-1]["time"] - lines[0]["started"], abs=1e-6)
    assert (first.last, second.first, second.last, second.code) == (30, 16, 60, 0)
    # Steps 17 to 30 were done twice, in 16.5 s of wall clock the first time, 0.3 s of it spent waiting for data.
    assert first.seconds["repeated"] == pytest.approx(460.181 - 443.718 - (1.2424 - 0.9454), abs=1e-3)
    assert second.seconds["held"] == pytest.approx(460.473 - 460.181, abs=1e-3)


def test_a_run_says_where_its_time_went() -> None:
    attempts = account([begin(1, 0), at(10, 1), at(99, 90), begin(100, 99, 50, restart=1), at(101, 51), at(200, 140)])
    assert told(attempts) == ["Time: 74.0% productive of 3.3 min in 2 attempts; repeated 20.0%, start-up 6.0%"]
    found = rows(attempts)
    assert found[0] == ["attempt", "steps", "productive", "repeated", "start-up", "wall"]
    assert [row[0] for row in found] == ["attempt", "1", "2", "all", "share"]
    assert account_table(attempts).splitlines()[1] == "|---|---|---|---|---|---|"
    assert (told([]), rows([]), account_table([])) == ([], [], "")


def test_a_timeline_is_written_at_what_holds_a_run_up_and_else_rarely(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, 4)
    for step in range(5, 100):
        timeline.at(step, {"data": step / 1000})
    timeline.at(100, {"data": 0.1, "checkpoint": 0.5})
    timeline.at(101, {"data": 0.1, "checkpoint": 0.5})
    timeline.ends({"data": 0.1, "checkpoint": 0.7})
    timeline.end(10)
    lines = [json.loads(line) for line in (tmp_path / TIMELINE_FILE).read_text().splitlines()]
    assert [line.get("step") for line in lines if line["event"] == "at"] == [5, 100, 101]
    [one] = account(lines)
    assert (one.first, one.last, one.code) == (4, 101, 10)


def test_a_clock_that_is_set_back_stops_no_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline, now = Timeline(tmp_path, 0), time.monotonic()
    timeline.at(1, {})
    for name, seconds in (("time", time.time() - 3600), ("monotonic", now + 5)):
        monkeypatch.setattr(time, name, lambda seconds=seconds: seconds)
    timeline.at(2, {})
    assert [json.loads(line).get("step") for line in (tmp_path / TIMELINE_FILE).open()] == [None, 1, 2]


def test_a_process_knows_when_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    own = started()
    assert time.time() - 3600 * 24 < own < time.time()
    monkeypatch.setenv("D2V_SCALE_STARTED", str(own - 7))
    assert started() == pytest.approx(own - 7, abs=0.05)


def test_the_meter_keeps_what_it_left_out_of_the_rates() -> None:
    now = [0.0]
    meter = SpeedMeter(lambda: now[0])
    for block, seconds in ((meter.waiting("data"), 2.0), (meter.paused(), 3.0), (meter.paused("checkpoint"), 5.0)):
        with block:
            now[0] += seconds
    meter.read()
    with meter.waiting("data"):
        now[0] += 1.0
    assert meter.spent == {"data": 3.0, "evaluation": 3.0, "checkpoint": 5.0}


def test_ranks_that_keep_no_record_keep_no_timeline(tmp_path: Path) -> None:
    other = RunTracker(tmp_path, TrackingConfig(enabled=False), is_main=False)
    other.start({}, {})
    other.spent(1, {"data": 1.0})
    assert other.timeline is None
    assert not (tmp_path / TIMELINE_FILE).exists()
