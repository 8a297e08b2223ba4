"""Old behaviour that a recipe may ask for by name."""

import numpy as np
import pytest
import torch

from d2v_scale.data.collate import Collator
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.model.config import ModelConfig, Predictor
from d2v_scale.model.stem_config import TextStem
from d2v_scale.shards.rows import Row, Stacked


class Words:
    """A decoder whose samples are token ids already."""

    def stack(self, values: list[np.ndarray]) -> Stacked:
        tokens = torch.from_numpy(np.stack(values))
        return Stacked(inputs=tokens, valid=None, length=tokens.shape[1], grid=None, valid_lengths=None)


class Planned:
    def __init__(self, count: int) -> None:
        self.sample_ids = np.arange(count)
        self.epoch_n = np.zeros(count, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sample_ids)


@pytest.mark.parametrize("masked_only", [False, True])
def test_the_text_teacher_reads_the_whole_sequence_unless_compat_says_otherwise(masked_only: bool) -> None:
    model = ModelConfig(text=TextStem(vocab_size=50, max_positions=32, mask_id=49), predictor=Predictor(kind="mlp"))
    masking = MaskingConfig(kind="spans", prob=0.35, length=4, starts="anywhere")
    compat = CompatConfig(text_teacher_masked_only=masked_only)
    collator = Collator("text", Words(), model, masking, compat, seed=0)  # type: ignore[arg-type]
    tokens = np.random.default_rng(0).integers(4, 49, (3, 32))
    rows = [Row(key=str(i), values=tokens[i]) for i in range(3)]
    batch = collator.batch(rows, Planned(3), [0, 1, 2], step=0, source="text", lost=0)  # type: ignore[arg-type]
    assert batch.student_inputs is not None
    assert torch.equal(batch.student_inputs == 49, batch.masked_rt)
    if masked_only:
        assert batch.valid is not None
        assert torch.equal(batch.inputs != 1, batch.masked_rt)
    else:
        assert torch.equal(batch.inputs, torch.from_numpy(tokens))
