"""Under which names MLflow shows figures: what a run is worth first, and of each stem what is measured of it."""

from d2v_scale.tracking.mirror_names import shown_as


def test_what_a_run_is_worth_comes_first_and_every_figure_keeps_its_name() -> None:
    assert shown_as("knn_accuracy", {}) == ["knn_accuracy", "1 quality/knn_accuracy"]
    assert shown_as("test/wer", {}) == ["test/wer", "1 quality/wer"]
    assert shown_as("test/samples", {}) == ["test/samples"]
    assert shown_as("grad_norm/stem", {"vision": "vision"}) == ["grad_norm/stem"]


def test_a_joint_run_lies_on_one_chart_with_runs_of_its_modalities() -> None:
    alone, joint = {"digits": "vision"}, {"photos": "vision", "talks": "speech", "pairs/text": "text"}
    assert shown_as("loss", alone) == ["loss", "1 quality/loss", "2 vision/loss"]
    assert shown_as("loss", joint) == ["loss", "1 quality/loss"]
    assert shown_as("loss/photos", joint) == ["loss/photos", "2 vision/loss"]
    assert shown_as("knn_accuracy/speech", joint) == ["knn_accuracy/speech", "2 speech/knn_accuracy"]
    assert shown_as("target_std/pairs/text", joint) == ["target_std/pairs/text", "2 text/target_std"]


def test_two_sources_of_a_stem_are_told_apart() -> None:
    assert shown_as("loss/b", {"a": "vision", "b": "vision"}) == ["loss/b", "2 vision b/loss"]


def test_what_is_no_source_is_none() -> None:
    assert shown_as("loss/masked_0_25", {"digits": "vision"}) == ["loss/masked_0_25"]
