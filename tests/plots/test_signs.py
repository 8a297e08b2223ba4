"""Which sign tells how runs end."""

from typing import Any

from d2v_scale.plots.signs import signs


def records(loss: float, accuracy: float) -> list[dict[str, Any]]:
    return [{"step": step, "held_out_loss": loss, "rankme": loss, "knn_accuracy": accuracy} for step in (0, 10, 20)]


def test_a_setting_whose_figure_is_not_finite_is_not_picked() -> None:
    """The least or the most of numbers with a NaN among them is NaN: the run that had diverged was what a sign picked,
    and no correlation was a number."""
    ends = {"calm": (1.0, 0.9), "fair": (2.0, 0.8), "poor": (3.0, 0.7)}
    settings = {label: [records(*end)] for label, end in ends.items()} | {"diverged": [records(float("nan"), 0.1)]}
    line = (
        "held-out loss in the end and k-NN in the end: r = -1.00; of settings: rank correlation -1.00, picks calm, 0.0"
    )
    assert f"- {line} points behind" in signs(settings, {"held-out loss": "held_out_loss"})
    assert any("picks poor, 20.0 points behind" in said for said in signs(settings, {"RankMe": "rankme"}))
