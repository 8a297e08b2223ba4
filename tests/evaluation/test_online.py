from dataclasses import replace

import pytest
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.evaluation.online import LabelledBatches, first_batches, rows


def speech(lengths: list[list[int]], samples_a_frame: int = 4) -> LabelledBatches:
    """Batches of waveforms with so many frames each; their labels count through."""
    made, number = [], 0
    for frames in lengths:
        valid_bt = torch.arange(max(frames))[None] < torch.tensor(frames)[:, None]
        valid = valid_bt.repeat_interleave(samples_a_frame, dim=1)
        ids = torch.arange(number, number + len(frames))
        batch = Batch(
            modality="speech",
            inputs=torch.where(valid, 1.0 + ids[:, None], 0.0),
            # As the loader has it: nothing to say where all are of one length.
            valid=None if len(set(frames)) == 1 else valid,
            masked_rt=torch.zeros_like(valid_bt),
            sample_ids=ids,
            keys=tuple(str(one) for one in ids.tolist()),
        )
        made.append((batch, ids))
        number += len(frames)
    return made


def test_batches_of_different_lengths_become_one() -> None:
    batch, labels = first_batches(speech([[3, 2], [4, 4], [2, 1]]), samples=6, size=10**6)
    assert labels.tolist() == batch.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.keys == ("0", "1", "2", "3", "4", "5")
    assert batch.masked_rt.shape == (6, 4)
    assert batch.valid is not None
    assert batch.valid.sum(dim=1).tolist() == [12, 8, 16, 16, 8, 4]
    assert torch.equal(batch.inputs, torch.where(batch.valid, 1.0 + batch.sample_ids[:, None], 0.0))
    assert rows(batch, 2, 4).keys == ("2", "3")


@pytest.mark.parametrize(("samples", "size", "taken"), [(6, 10**6, 6), (5, 10**6, 4), (6, 4 * 16 * 4, 4), (1, 1, 2)])
def test_limits_hold_except_for_the_first_batch(samples: int, size: int, taken: int) -> None:
    batch, labels = first_batches(speech([[3, 2], [4, 4], [2, 1]]), samples=samples, size=size)
    assert len(labels) == len(batch.inputs) == taken


@pytest.mark.parametrize("name", tiny_models.ARRAYS)
def test_batches_of_arrays_become_one_where_some_are_whole(name: str) -> None:
    """What is said of patches was taken for what is said of values: the pictures at its end ended a run."""
    batches = [tiny_models.batch(name, padded=padded) for padded in (True, False, True)]
    shown = [replace(one, masked_rt=torch.zeros_like(one.masked_rt), real_bt=None, layout=None) for one in batches]
    batch, _ = first_batches([(one, one.sample_ids) for one in shown], samples=9, size=10**6)
    whole = torch.ones_like(shown[1].masked_rt)
    assert batch.valid is not None
    assert torch.equal(batch.valid, torch.cat([whole if one.valid is None else one.valid for one in shown]))
    assert torch.equal(batch.inputs, torch.cat([one.inputs for one in shown]))
    assert batch.grid == shown[0].grid


def test_a_grid_of_joined_recordings_is_that_of_the_longest() -> None:
    lines = speech([[3, 2], [4, 4]], samples_a_frame=4)
    on_grids = [(replace(one, grid=(one.masked_rt.shape[1], 1)), labels) for one, labels in lines]
    batch, _ = first_batches(on_grids, samples=4, size=10**6)
    assert batch.grid == (4, 1)
