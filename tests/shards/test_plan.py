"""d2v_scale.shards.plan"""

import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.errors import DataError
from d2v_scale.shards.order import WindowOrder
from d2v_scale.shards.plan import Cursor, Mixture, PlannedBatch, SourcePlan

counts_of_shards = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any)


def plain(counts: list[int], window: int, batch: int, seed: int = 1) -> SourcePlan:
    return SourcePlan(WindowOrder(len(counts), counts.__getitem__, window, seed, "s"), 0, batch)


def bucketed(counts: list[int], window: int, batch: float, **options: bool) -> SourcePlan:
    lengths = [np.random.default_rng(shard).integers(1, 50, count) for shard, count in enumerate(counts)]
    order = WindowOrder(len(counts), counts.__getitem__, window, 1, "s")
    return SourcePlan(order, 0, batch, length_of=lengths.__getitem__, **options)


def items(batch: PlannedBatch) -> list[tuple[int, int, int]]:
    return list(zip(batch.epoch_n.tolist(), batch.shard_n.tolist(), batch.item_n.tolist(), strict=True))


@settings(max_examples=30, deadline=None)
@given(counts=counts_of_shards, window=st.integers(1, 5), batch=st.integers(1, 40), use_lengths=st.booleans())
def test_every_epoch_delivers_every_item_once(counts: list[int], window: int, batch: int, use_lengths: bool) -> None:
    plan = bucketed(counts, window, batch) if use_lengths else plain(counts, window, batch)
    cursor, seen = Cursor(), Counter[tuple[int, int, int]]()
    while cursor.epoch < 2:
        planned, cursor = plan.next_batch(cursor)
        assert len(planned) <= batch
        assert use_lengths or len(planned) == batch
        seen.update(items(planned))
    expected = {(e, s, i) for e in (0, 1) for s, count in enumerate(counts) for i in range(count)}
    assert {item: n for item, n in seen.items() if item[0] < 2} == dict.fromkeys(expected, 1)


@settings(max_examples=30, deadline=None)
@given(
    counts=counts_of_shards,
    window=st.integers(1, 5),
    batch=st.integers(1, 40),
    stop=st.integers(0, 12),
    use_lengths=st.booleans(),
)
def test_a_new_plan_continues_from_a_cursor(
    counts: list[int], window: int, batch: int, stop: int, use_lengths: bool
) -> None:
    def make() -> SourcePlan:
        return bucketed(counts, window, batch) if use_lengths else plain(counts, window, batch)

    first, cursor = make(), Cursor()
    for _ in range(stop):
        _, cursor = first.next_batch(cursor)
    second, other = make(), cursor
    for _ in range(5):
        expected, cursor = first.next_batch(cursor)
        planned, other = second.next_batch(other)
        assert items(planned) == items(expected)
        assert (planned.length, other) == (expected.length, cursor)


@pytest.mark.parametrize("use_lengths", [False, True])
def test_a_billion_samples_resume_anywhere_in_the_memory_of_a_few_windows(use_lengths: bool) -> None:
    order = WindowOrder(100_000, lambda _: 10_000, 16, 1, "s")
    lengths = np.random.default_rng(0).integers(1, 50, 10_000)
    plan = SourcePlan(order, 0, 4096, length_of=(lambda _: lengths) if use_lengths else None)
    tracemalloc.start()
    started = time.process_time()
    # Near the end of a window deep in the fourth epoch, and on into the next one.
    cursor = Cursor(3, 4711, 35 if use_lengths else 159_000)
    for _ in range(10):
        batch, cursor = plan.next_batch(cursor)
        assert 3000 < len(batch) <= 4096
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (cursor.epoch, cursor.window) == (3, 4712)
    assert peak < 64e6, f"{peak / 1e6:.1f} MB"
    assert seconds < 5.0


def test_what_rows_lose_to_the_shortest_of_their_batch_is_counted() -> None:
    """In windows of few batches it was a large share of the audio, in no figure."""
    lengths = {shard: np.random.default_rng(shard).integers(10, 50, 20) for shard in range(8)}
    order = WindowOrder(8, lambda _: 20, 2, 1, "s")
    plan = SourcePlan(order, 0, 16, length_of=lengths.__getitem__, crop_to_shortest=True)
    assert plan.cropped_share(Cursor()) > 0.1
    cursor, cropped, total = Cursor(), 0, 0
    while cursor.window == 0:
        batch, cursor = plan.next_batch(cursor)
        whole = sum(int(lengths[s][i]) for _, s, i in items(batch))
        assert batch.cropped == whole - batch.length * len(batch)
        cropped, total = cropped + batch.cropped, total + whole
        if cursor.offset * 16 >= 40:
            break
    assert plan.cropped_share(Cursor()) == pytest.approx(cropped / total)
    padded = SourcePlan(order, 0, 16, length_of=lengths.__getitem__)
    assert padded.cropped_share(Cursor()) == 0


def test_empty_shards_that_lie_between_two_epochs_items_are_passed_over() -> None:
    counts = [0, 0, 0, 0, 3]
    for seed in range(30):
        plan, cursor = plain(counts, 1, 2, seed), Cursor()
        for _ in range(12):
            batch, cursor = plan.next_batch(cursor)
            assert len(batch) == 2


@settings(deadline=None)
@given(rows=st.integers(0, 60), parts=st.integers(1, 24))
def test_shares_are_a_partition_and_even(rows: int, parts: int) -> None:
    batch = PlannedBatch(0, np.zeros(rows, int), np.zeros(rows, int), np.arange(rows))
    shares = [batch.share(part, parts) for part in range(parts)]
    assert np.concatenate([share.item_n for share in shares]).tolist() == list(range(rows))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shortest", [True, False])
def test_bucketed_batches_hold_rows_of_about_one_length(shortest: bool) -> None:
    counts = [200, 200, 200]
    plan = bucketed(counts, 3, 400, cost_is_length=True, crop_to_shortest=shortest)
    lengths = [np.random.default_rng(shard).integers(1, 50, count) for shard, count in enumerate(counts)]
    cursor, used, given_ = Cursor(), 0, 0
    while True:
        batch, cursor = plan.next_batch(cursor)
        if batch.epoch_n[0] > 0:
            break
        rows = np.array([lengths[s][i] for s, i in zip(batch.shard_n, batch.item_n, strict=True)])
        assert batch.length == (rows.min() if shortest else rows.max())
        assert rows.sum() <= 400 + 50
        used += len(rows) * batch.length
        given_ += rows.sum()
    assert abs(used / given_ - 1) < 0.06


def test_items_of_length_0_are_left_out() -> None:
    order = WindowOrder(2, lambda _: 10, 1, 1, "s")
    plan = SourcePlan(order, 0, 4, length_of=lambda shard: np.arange(10) if shard else np.zeros(10, int))
    batch, _ = plan.next_batch(Cursor())
    assert set(batch.shard_n.tolist()) == {1}
    assert 0 not in batch.item_n


def test_a_source_without_usable_items_says_so() -> None:
    plan = SourcePlan(WindowOrder(2, lambda _: 3, 1, 1, "short"), 0, 4, length_of=lambda _: np.zeros(3, int))
    with pytest.raises(DataError, match="'short' is usable"):
        plan.next_batch(Cursor())


def test_sample_ids_are_distinct() -> None:
    ids = set()
    for source in range(3):
        batch = PlannedBatch(source, np.zeros(6, int), np.repeat([0, 1], 3), np.tile([0, 1, 2], 2))
        ids |= set(batch.sample_ids.tolist())
    assert len(ids) == 18


def test_mixture_follows_weights_and_temperature() -> None:
    assert np.allclose(Mixture([1, 3], 1.0, 1).shares, [0.25, 0.75])
    assert np.allclose(Mixture([1, 9], 2.0, 1).shares, [0.25, 0.75])
    mixture = Mixture([1, 3], 1.0, 7)
    steps = [mixture.source_of(step) for step in range(4000)]
    assert abs(np.mean(steps) - 0.75) < 0.03
    assert steps == [Mixture([1, 3], 1.0, 7).source_of(step) for step in range(4000)]


@settings(max_examples=40, deadline=None)
@given(
    length_n=st.lists(st.integers(-1, 60), min_size=1, max_size=80),
    batch=st.integers(1, 20),
    seconds=st.booleans(),
    shortest=st.booleans(),
)
def test_what_has_no_length_changes_no_batch_of_the_others(
    length_n: list[int], batch: int, seconds: bool, shortest: bool
) -> None:
    """It counted as the shortest that is allowed: the 31 sound recordings of its batch were cropped to 0.1 s."""

    def batches(known: np.ndarray) -> list[PlannedBatch]:
        order = WindowOrder(1, lambda _: len(known), 1, 1, "s")
        options = {"cost_is_length": seconds, "crop_to_shortest": shortest}
        plan = SourcePlan(order, 0, batch, length_of=lambda _: known, **options)
        return plan._window(0, 0)

    lengths = np.array(length_n)
    found, without = batches(lengths), batches(lengths.clip(min=0))
    for one in found:
        kept = lengths[one.item_n] > 0
        assert one.unread == np.sum(~kept)
        assert one.measured_length == one.length * kept.sum()
        known = lengths[one.item_n[kept]]
        assert one.length == (0 if not len(known) else known.min() if shortest else known.max())
    assert sorted(item for one in found for item in one.item_n) == np.flatnonzero(lengths != 0).tolist()
    if without:
        readable = [[item for item in one.item_n if lengths[item] > 0] for one in found]
        assert readable == [one.item_n.tolist() for one in without]
        assert [(one.length, one.cropped) for one in found] == [(one.length, one.cropped) for one in without]


def test_holes_are_spread_over_the_shares_of_a_batch() -> None:
    lengths = np.array([7] * 16 + [-1] * 8)
    order = WindowOrder(1, lambda _: 24, 1, 1, "s")
    plan = SourcePlan(order, 0, 16, length_of=lambda _: lengths, crop_to_shortest=True)
    [batch] = plan._window(0, 0)
    shares = [batch.share(part, 4) for part in range(4)]
    assert [int(np.sum(lengths[share.item_n] > 0)) for share in shares] == [4, 4, 4, 4]
