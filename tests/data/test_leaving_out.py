"""Ranges of the planned order that no step reads."""

from collections import Counter

import pytest

from d2v_scale.data.config import DataConfig, LeaveOut, SourceConfig
from d2v_scale.data.leaving_out import LeavingOut
from d2v_scale.errors import ConfigError
from d2v_scale.shards.order import WindowOrder
from d2v_scale.shards.plan import Cursor, PlannedBatch, SourcePlan


def make_plan() -> SourcePlan:
    return SourcePlan(WindowOrder(3, lambda _: 20, 2, 1, "s"), 0, 8)


def read(leaving_out: LeavingOut, batches: int) -> tuple[list[PlannedBatch], list[Cursor]]:
    plan, cursor = make_plan(), Cursor()
    found, cursors = [], [cursor]
    for _ in range(batches):
        leaving_out.note([cursor])
        batch, cursor = leaving_out.next_batch(plan, 0, cursor)
        found.append(batch)
        cursors.append(cursor)
    return found, cursors


def items(batches: list[PlannedBatch]) -> list[list[int]]:
    return [[*batch.sample_ids.tolist(), *batch.epoch_n.tolist()] for batch in batches]


def test_a_range_between_two_steps_leaves_all_others_as_they_are() -> None:
    whole, cursors = read(LeavingOut(["s"], []), 12)
    begin, end = cursors[3], cursors[5]
    left = LeaveOut(
        source="s", begin=[begin.epoch, begin.window, begin.offset], end=[end.epoch, end.window, end.offset]
    )
    without, _ = read(LeavingOut(["s"], [left]), 10)
    assert items(without) == items(whole[:3] + whole[5:])
    # What is passed over is counted, so that epochs add up.
    assert [batch.left_out for batch in without if batch.left_out] == [{0: 16}]
    later = LeavingOut(["s"], [])
    later.add(left)
    assert items(read(later, 10)[0]) == items(without)


def test_ranges_over_the_end_of_an_epoch_and_side_by_side_are_left_out() -> None:
    whole, cursors = read(LeavingOut(["s"], []), 14)
    ranges = [
        LeaveOut(source="s", begin=list(vars(cursors[a]).values()), end=list(vars(cursors[b]).values()))
        for a, b in ((6, 8), (8, 9), (1, 2))
    ]
    without, _ = read(LeavingOut(["s"], ranges), 10)
    assert items(without) == items(whole[:1] + whole[2:6] + whole[9:])
    passed = Counter[int]()
    for batch in without:
        passed.update(batch.left_out)
    assert passed == {0: 8 + 12, 1: 12}


def test_the_latest_steps_name_what_they_have_read() -> None:
    leaving_out = LeavingOut(["s", "other"], [])
    plan, cursor = make_plan(), Cursor()
    assert leaving_out.latest(2, [cursor, Cursor()]) == []
    for _ in range(4):
        leaving_out.note([cursor, Cursor()])
        _, cursor = leaving_out.next_batch(plan, 0, cursor)
    now = [cursor, Cursor()]
    assert leaving_out.latest(2, now) == [LeaveOut(source="s", begin=[0, 0, 16], end=[0, 0, 32])]
    assert leaving_out.latest(9, now) == [LeaveOut(source="s", begin=[0, 0, 0], end=[0, 0, 32])]
    leaving_out.forget()
    assert leaving_out.latest(2, now) == []


def test_a_range_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="names the source 'b'"):
        LeavingOut(["a"], [LeaveOut(source="b", end=[1, 0, 0])])
    with pytest.raises(ConfigError, match="names a, which has no index"):
        LeavingOut(["a"], [LeaveOut(source="a", end=[1, 0, 0])], streams=["a"])
    data = DataConfig(sources=[SourceConfig(shards="x.tar")], leave_out=[LeaveOut(source="vision", begin=[0, 1, 0])])
    with pytest.raises(ConfigError, match=r"data\.leave_out\.0"):
        data.check(["vision"])


def test_what_was_read_lately_is_told_to_a_process_that_goes_on_from_memory() -> None:
    one = LeavingOut(["a", "b"], [])
    for offset in range(4):
        one.note([Cursor(0, 0, 8 * offset), Cursor(0, 1, 0)])
    now = [Cursor(0, 0, 32), Cursor(0, 1, 0)]
    other = LeavingOut(["a", "b"], [])
    other.recall(one.lately(2))
    assert one.latest(2, now) == other.latest(2, now) == other.latest(9, now)
    assert [(found.source, found.begin, found.end) for found in other.latest(2, now)] == [("a", [0, 0, 16], [0, 0, 32])]
