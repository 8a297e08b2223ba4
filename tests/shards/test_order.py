"""d2v_scale.shards.order"""

import time
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.shards.order import KeyedPermutation, WindowOrder


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_keyed_permutation_visits_everything_once(size: int, seed: int) -> None:
    permutation = KeyedPermutation(size, seed)
    assert sorted(permutation(k) for k in range(size)) == list(range(size))


def test_keyed_permutation_is_uniform_at_every_place() -> None:
    size, draws = 5, 500
    counts = np.zeros((size, size))
    for seed in range(draws):
        permutation = KeyedPermutation(size, "uniform", seed)
        for position in range(size):
            counts[position, permutation(position)] += 1
    # Six standard deviations of a binomial.
    assert np.abs(counts - draws / size).max() < 6 * np.sqrt(draws * 0.2 * 0.8)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    window=st.integers(1, 5),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 5),
)
def test_an_epoch_holds_every_item_once(counts: list[int], window: int, seed: int, epoch: int) -> None:
    order = WindowOrder(len(counts), counts.__getitem__, window, seed, "s")
    seen = []
    for number in range(order.windows):
        shard_n, item_n = order.items(epoch, number)
        seen += list(zip(shard_n.tolist(), item_n.tolist(), strict=True))
    assert sorted(seen) == [(shard, item) for shard, count in enumerate(counts) for item in range(count)]


def test_every_epoch_has_another_order_of_shards_and_of_items() -> None:
    order = WindowOrder(40, lambda _: 10, 4, 1, "s")
    first, second = ([order.shards(epoch, w) for w in range(10)] for epoch in (0, 1))
    assert first != second
    assert not np.array_equal(order.items(0, 0)[1], order.items(1, 0)[1])


def test_the_source_is_part_of_the_order() -> None:
    assert WindowOrder(40, lambda _: 10, 4, 1, "a").shards(0, 0) != WindowOrder(40, lambda _: 10, 4, 1, "b").shards(
        0, 0
    )


def test_a_billion_items_cost_a_window() -> None:
    order = WindowOrder(100_000, lambda _: 10_000, 16, 1, "s")
    tracemalloc.start()
    started = time.process_time()
    shard_n, _ = order.items(3, 4711)
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(shard_n) == 160_000
    assert peak < 16e6, f"{peak / 1e6:.1f} MB"
    assert seconds < 1.0
