from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from d2v_scale.interop.export_check import LARGEST_DIFFERENCE, largest, output_pairs


@pytest.mark.parametrize("block", [0, 1])
def test_a_nan_in_any_exported_block_is_no_pass(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    model = tiny_models.model("v1_speech")
    ours = [torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)]
    theirs = [states.clone() for states in ours]

    def exported(**arguments: Any) -> Any:
        return SimpleNamespace(hidden_states=(torch.zeros(2, 5, 3), *theirs))

    encoder: Any = SimpleNamespace(
        recipe=SimpleNamespace(model=model),
        device="cpu",
        hidden_states=lambda batch: ours,
        valid_positions=lambda batch: None,
    )
    loaded: Any = SimpleNamespace(eval=lambda: SimpleNamespace(float=lambda: exported))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda folder, **options: loaded)
    checkpoint: Any = None
    assert largest(output_pairs(encoder, Path(), "speech", checkpoint), relative=False) == 0.0
    theirs[block][1, 3, 2] = float("nan")
    assert not largest(output_pairs(encoder, Path(), "speech", checkpoint), relative=False) <= LARGEST_DIFFERENCE
