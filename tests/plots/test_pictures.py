import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from d2v_scale.batch import Batch
from d2v_scale.plots.curves import finish_axes, plot_health, series
from d2v_scale.plots.groups import GROUPS, line_labels, names_of
from d2v_scale.plots.relations import plot_cka, plot_neighbours, same_labels
from d2v_scale.plots.samples import plot_masks, plot_pca, plot_similarity, principal_colours, to_image
from d2v_scale.tracking.record import MetricsLog


def batch(
    modality: str,
    inputs: torch.Tensor,
    length: int,
    valid: torch.Tensor | None = None,
    clones: int = 2,
    grid: tuple[int, ...] = (),
) -> Batch:
    rows = inputs.shape[0] * clones
    masked = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)).argsort(1) < length // 2
    ids = torch.arange(inputs.shape[0])
    return Batch(modality=modality, inputs=inputs, valid=valid, masked_rt=masked, sample_ids=ids, grid=grid)  # type: ignore[arg-type]


def is_picture(path: Path | None) -> bool:
    """More than a blank page."""
    assert path is not None
    return np.asarray(Image.open(path).convert("L")).std() > 5


def test_masks_are_drawn_for_every_modality(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 16, 16)
    assert is_picture(plot_masks(batch("vision", images, 16, grid=(4, 4)), "vision", tmp_path / "vision.png"))
    waves = torch.randn(2, 8000)
    valid = torch.arange(8000)[None] < torch.tensor([[8000], [5000]])
    assert is_picture(plot_masks(batch("speech", waves, 24, valid), "speech", tmp_path / "speech.png"))
    tokens = torch.randint(5, 100, (2, 60))
    assert is_picture(plot_masks(batch("text", tokens, 60), "text", tmp_path / "text.png", decode=lambda i: f"${i}"))


def test_features_are_drawn(tmp_path: Path) -> None:
    assert is_picture(plot_pca(torch.rand(3, 1, 16, 16), torch.randn(3, 16, 8), tmp_path / "pca.png", grid=(4, 4)))
    assert is_picture(plot_similarity(torch.randn(8000), torch.randn(24, 8), tmp_path / "similarity.png"))
    layers = torch.randn(3, 20, 8)
    assert is_picture(plot_cka(layers, layers, tmp_path / "cka.png", row_name="teacher", column_name="student"))


@pytest.mark.parametrize("samples", [list(torch.rand(6, 1, 8, 8)), list(torch.randn(6, 300)), ["a b $x_", "c"] * 3])
def test_neighbours_are_drawn(tmp_path: Path, samples: list[torch.Tensor] | list[str]) -> None:
    path = plot_neighbours(torch.randn(6, 4), samples, ["x", "y"] * 3, tmp_path / "n.png", queries=3)
    assert is_picture(path)


def test_wide_text_stays_in_its_frame(tmp_path: Path) -> None:
    plain = plot_neighbours(torch.eye(3), ["a b"] * 3, ["x"] * 3, tmp_path / "plain.png")
    wide = plot_neighbours(torch.eye(3), ["a " + "=" * 39 + " b"] * 3, ["x"] * 3, tmp_path / "wide.png")
    frames = [np.asarray(Image.open(path).convert("L")) < 250 for path in (plain, wide)]
    between = ~frames[0].any(axis=0)
    assert between.any()
    assert not frames[1][:, between].any()


def test_one_colour_means_one_thing() -> None:
    features = torch.zeros(2, 4, 8)
    features[0, :2] = features[1, 2:] = torch.randn(8)
    colours = principal_colours(features)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert torch.allclose(colours[0, 0, 0], colours[1, 3, 0])
    assert (colours[0, 0, 0] - colours[0, 3, 0]).abs() > 0.9


def test_a_constant_image_is_shown() -> None:
    assert np.isfinite(to_image(torch.ones(1, 4, 4))).all()


def test_health_panel_shows_non_finite_points(tmp_path: Path) -> None:
    assert plot_health(tmp_path) is None
    log = MetricsLog(tmp_path)
    for step in range(1, 30):
        log.write(step, step, {"loss": 1 / step, "grad_norm": math.nan if step == 5 else 1.0})
    log.write(29, 29, {"knn_accuracy": 0.5})
    log.close()
    assert is_picture(plot_health(tmp_path))
    assert (tmp_path / "plots" / "health.png").exists()


def test_a_long_legend_covers_no_curve() -> None:
    axes = Figure().add_subplot()
    for name in "abcd":
        axes.plot([0, 1], [0, 1], label=name)
    finish_axes(axes, GROUPS[0], [0.0, 1.0], lines=4)
    axes.figure.canvas.draw()
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0


def test_counters_of_nothing_lie_on_the_lower_edge() -> None:
    axes = Figure().add_subplot()
    axes.plot([0, 1], [0, 0], label="skipped")
    finish_axes(axes, next(group for group in GROUPS if "skipped*" in group.names), [0.0, 0.0], lines=1)
    assert axes.get_ylim()[0] == 0


def test_counts_of_samples_are_not_drawn_beside_shares() -> None:
    records = [{"knn_samples": 360, "test/samples": 9, "test/wer": 0.1}]
    drawn = [name for group in GROUPS for name in names_of(records, group)]
    assert drawn == ["test/wer"]


def test_series_and_groups() -> None:
    records = [
        {"step": 1, "samples": 8, "loss": 2.0},
        {"step": 2, "samples": 16, "knn_accuracy": 0.5, "knn_samples": 360, "data_wait_share": 0.1},
    ]
    assert series(records, "knn_accuracy", "samples") == ([16.0], [0.5])
    found = {group.title: names_of(records, group) for group in GROUPS}
    assert found["Loss"] == ["loss"]
    later = [{"step": 0, "held_out_loss": 1.0}, {"step": 1, "loss": 2.0, "loss/a": 1.0, "loss/masked_50_75": 2.0}]
    assert names_of(later, GROUPS[0]) == ["loss", "held_out_loss", "loss/a"]
    assert names_of(later, GROUPS[1]) == ["loss/masked_50_75"]
    assert found["Accuracy of k nearest neighbours and probes"] == ["knn_accuracy"]
    assert found["Share of time"] == ["data_wait_share"]


def test_lines_are_called_by_words_that_tell_them_apart() -> None:
    assert line_labels(["grad_norm", "grad_norm/blocks_first"]) == {
        "grad_norm": "all",
        "grad_norm/blocks_first": "first third of the blocks",
    }
    spreads = line_labels(["target_std/pairs/text", "prediction_std/pairs/text"])
    assert list(spreads.values()) == ["targets, pairs, text", "predictions, pairs, text"]
    assert list(line_labels(["test/wer", "test/cer"]).values()) == ["word error rate", "character error rate"]


def test_neighbours_of_all_samples_are_compared_with_chance() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]])
    assert same_labels(features, ["a", "a", "b", "b", ""], 1) == (1.0, 1 / 3)
    assert same_labels(features, ["a", "b", "a", "b", ""], 1) == (0.0, 1 / 3)
    assert same_labels(features, [""] * 5, 1) is None
