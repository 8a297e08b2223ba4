import pytest
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
