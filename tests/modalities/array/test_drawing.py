"""Arrays of any number of axes have pictures."""

from pathlib import Path

import pytest
import tiny_models
import torch

from d2v_scale.modalities.array.drawing import ArrayDrawing, as_image
from d2v_scale.plots.samples import plot_masks


@pytest.mark.parametrize("name", tiny_models.ARRAYS)
def test_masks_of_any_number_of_axes_are_drawn(name: str, tmp_path: Path) -> None:
    clones = 2 if name.startswith("v2") else 1
    batch = tiny_models.batch(name, clones=clones, padded=True)
    assert plot_masks(batch, "array", tmp_path / "masks.png").stat().st_size > 1000
    states_btd = torch.randn(3, batch.masked_rt.shape[1], 8)
    made = ArrayDrawing().features(batch, states_btd, None, ["a", "b", "c"], lambda kind: tmp_path / f"{kind}.png")
    assert len(made) == (1 if name == "v2_maps" else 0)
    assert all(path.is_file() for path in made)


@pytest.mark.parametrize(
    ("shape", "picture"),
    [
        ((2, 9), (1, 2, 9)),
        ((2, 4, 9), (1, 4, 9)),
        ((3, 4, 9), (3, 4, 9)),
        ((1, 5, 4, 9), (1, 4, 36)),
        ((3, 2, 4, 9), (3, 4, 18)),
        ((1, 2, 5, 4, 9), (1, 4, 36)),
    ],
)
def test_an_array_is_shown_as_an_image(shape: tuple[int, ...], picture: tuple[int, ...]) -> None:
    assert as_image(torch.zeros(shape)).shape == picture
