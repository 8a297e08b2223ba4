"""The indices that a batch carries beside its mask."""

import dataclasses

import hypothesis.strategies as st
import torch
from hypothesis import given

from d2v_scale.batch import Batch, Layout

masks = st.tuples(st.integers(0, 5), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.bool).view(shape))
)


@given(masks)
def test_layout_lists_masked_positions_row_major_and_visible_ones_ascending(masked_rt: torch.Tensor) -> None:
    layout = Layout.of(masked_rt)
    assert torch.equal(masked_rt.flatten()[layout.masked_n], torch.ones(int(masked_rt.sum()), dtype=torch.bool))
    assert layout.masked_n.tolist() == sorted(set(layout.masked_n.tolist()))
    counts = masked_rt.sum(dim=1).unique()
    if len(counts) > 1:
        assert layout.visible_rs is None
        return
    assert layout.visible_rs is not None
    for row, kept in zip(masked_rt, layout.visible_rs, strict=True):
        assert kept.tolist() == [t for t, masked in enumerate(row.tolist()) if not masked]


def test_a_batch_computes_its_layout_once_and_keeps_it_when_it_moves() -> None:
    masked_rt = torch.tensor([[True, False, False], [False, True, False]])
    batch = Batch(
        modality="text",
        inputs=torch.zeros(2, 3, dtype=torch.int64),
        valid=None,
        masked_rt=masked_rt,
        sample_ids=torch.arange(2),
    )
    assert batch.layout.masked_n.tolist() == [0, 4]
    moved = batch.to(torch.device("meta"))
    assert moved.layout.masked_n.is_meta
    assert moved.layout.visible_rs is not None
    assert moved.layout.visible_rs.shape == (2, 2)
    assert batch.clones == 1
    other = dataclasses.replace(batch, masked_rt=~masked_rt, layout=None)
    assert other.layout.masked_n.tolist() == [1, 2, 3, 5]
