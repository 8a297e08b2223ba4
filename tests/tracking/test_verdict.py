"""What a record says of a run's health: each rule has a run that breaks it alone, and one next to it that does not."""

from collections.abc import Callable
from typing import Any

import pytest

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.tracking.verdict import signs, verdict

Record = dict[str, Any]
DISTANCE = "student_teacher_distance_relative"


def healthy() -> list[Record]:
    """A run of 20 log points as a small one is."""
    records: list[Record] = [{"step": 0, "knn_accuracy": 0.4, "knn_samples": 400.0, "layer_likeness": 0.99}]
    records[0]["held_out_explained"] = -0.3
    for k in range(1, 21):
        records.append(
            {
                "step": 10 * k,
                "hours": 0.02 * k,
                "loss": 1.0 / k,
                "grad_norm": 0.1 + 1.0 / k,
                "target_std": 1.0,
                "prediction_std": 0.2,
                "target_rank": 3.0 + k / 2,
                "masked_share": 0.6,
                "lr": 1e-3,
                "decay": 0.99,
                "teacher_update_norm": 0.01,
                "student_teacher_distance_relative": 0.07,
                "data_wait_share": 0.9 if k == 1 else 0.03,
                "samples_per_second": 30.0 if k == 1 else 100.0,
                "skipped_updates": 1.0,
                "data/planned": 640.0 * k,
                "data/lost": 0.0,
            }
        )
    explained = {"held_out_explained": 0.5}
    layers = {"layer_likeness": 0.9}
    records.append({"step": 200, "knn_accuracy": 0.7, "knn_samples": 400.0, "knn_chance": 0.1, **explained, **layers})
    return records


def changed(start: int = 1, **values: float) -> Callable[[list[Record]], None]:
    """From log point `start` on the figures have these values."""

    def change(records: list[Record]) -> None:
        for record in records[start:]:
            record.update({name: value for name, value in values.items() if name in record})

    return change


def test_a_healthy_run_is_called_so() -> None:
    assert verdict(healthy()) == "Healthy: none of the signs of trouble is there."
    assert verdict([]).startswith("Nothing was recorded")
    assert signs(healthy()[:3]) == []
    assert verdict(healthy()[:3]).startswith("Nothing to look at so far; 2 recorded ")


@pytest.mark.parametrize(
    ("name", "bad", "near"),
    [
        ("a collapse", changed(target_std=0.05), changed(target_std=0.11)),
        ("a collapse", changed(20, prediction_std=float("nan")), changed(prediction_std=0.02)),
        ("the rank of the targets", changed(8, target_rank=1.5), changed(8, target_rank=2.5)),
        ("the gradient", changed(15, grad_norm=50.0), changed(15, grad_norm=1.0)),
        ("skipped steps", changed(skipped_updates=30.0), changed(skipped_updates=2.0)),
        ("the loss", changed(15, loss=0.9), changed(15, loss=0.07)),
        ("the loss", changed(20, loss=float("inf")), changed(20, loss=0.05)),
        ("what was learned", changed(21, knn_accuracy=0.3), changed(21, knn_accuracy=0.37)),
        ("the labels", changed(21, knn_chance=0.7), changed(21, knn_chance=0.6)),
        ("the masks", changed(masked_share=0.04), changed(masked_share=0.06)),
        ("the held-out targets", changed(21, held_out_explained=-0.4), changed(21, held_out_explained=-0.01)),
        ("the layers", changed(21, layer_likeness=0.999), changed(21, layer_likeness=0.994)),
        ("the teacher", changed(teacher_update_norm=0.0), changed(10, teacher_update_norm=1e-9)),
        ("the teacher", changed(**{DISTANCE: 0.7}), changed()),
        (
            "the teacher",
            changed(student_teacher_distance_relative=0.0),
            changed(student_teacher_distance_relative=1e-4),
        ),
        ("the loader", changed(2, data_wait_share=0.2), changed(2, data_wait_share=0.12)),
        ("lost samples", changed(**{"data/lost": 100.0}), changed(**{"data/lost": 0.5})),
        ("the speed", changed(12, samples_per_second=60.0), changed(12, samples_per_second=75.0)),
    ],
)
def test_every_sign_is_found_alone(name: str, bad: Any, near: Any) -> None:
    records = healthy()
    bad(records)
    assert [sign.name for sign in signs(records)] == [name]
    assert verdict(records).startswith(f"Look at {name}: ")
    records = healthy()
    near(records)
    assert signs(records) == []


def test_one_of_several_sources_that_collapses_is_named() -> None:
    records = healthy()
    for record in records[1:21]:
        del record["target_std"], record["prediction_std"]
        record |= {"target_std/photos": 0.9, "target_std/talks": 0.04}
    [sign] = signs(records)
    assert sign.said == "the targets of talks spread by 0.04 only, less than 0.1"


def test_the_recipes_own_limits_count() -> None:
    records = healthy()
    changed(target_std=0.05)(records)
    assert signs(records, HealthConfig(min_target_std=0.01)) == []


def test_several_signs_make_one_sentence() -> None:
    records = healthy()
    changed(2, data_wait_share=0.5)(records)
    changed(**{"data/lost": 300.0})(records)
    assert verdict(records) == (
        "Look at the loader and lost samples: 50% of a step waits for data (see data.workers); 300 of 12800 could not "
        "be read."
    )


def test_labels_of_hundreds_of_classes_are_not_blamed_on_a_few_samples() -> None:
    """A joint run of sixteen steps found two of eighty among 267 classes, and was told to look at its labels."""
    records = healthy()
    records[-1] |= {"knn_accuracy/speech": 0.025, "knn_chance/speech": 0.012, "knn_samples/speech": 80.0}
    assert not [sign for sign in signs(records, HealthConfig()) if sign.name == "the labels"]
    records[-1] |= {"knn_accuracy/speech": 0.0125, "knn_samples/speech": 800.0}
    assert [sign for sign in signs(records, HealthConfig()) if sign.name == "the labels"]


def test_layers_that_are_as_alike_as_with_random_weights_are_no_sign() -> None:
    """A short run of a 2.0 model on pictures was told to look at them: by the likeness of student and teacher, and that
    was as near to 1 before its first step. One on recordings got from 0.9984 to 0.9994, and all was well."""
    records = healthy()
    alike = {f"cka/layer_{layer:02d}": 0.997 for layer in (1, 2, 3)}
    records[0] |= {"layer_likeness": 0.997, **alike}
    records[-1] |= {"layer_likeness": 0.9994, **alike}
    assert signs(records) == []
    records[0]["layer_likeness"] = 0.991
    assert [sign.said for sign in signs(records)] == ["the last is like the first (CKA 0.9994, 0.9910 at first)"]
    records[-1]["layer_likeness"] = 0.9953
    assert signs(records) == []


def test_recordings_that_are_all_silent_are_named_although_their_targets_vary_with_their_positions() -> None:
    records = healthy()
    for record in records[1:21]:
        record |= {"stem_std": 0.55, "stem_std/pictures": 1.1, "stem_std/talks": 0.001, "target_std/talks": 0.48}
    [sign] = signs(records)
    assert sign.name == "a collapse"
    assert (
        sign.said == "what the stem makes of talks spreads by 0.001 only, less than 0.002: are its samples all alike?"
    )
    changed(**{"stem_std/talks": 0.009})(records)
    assert signs(records) == []


def test_held_out_targets_that_are_explained_as_little_as_at_first_are_no_sign_in_a_run_that_has_just_begun() -> None:
    """A short run of a 2.0 model on text went from -0.09 % to -0.14 %."""
    records = healthy()
    records[0]["held_out_explained"], records[-1]["held_out_explained"] = -0.0009, -0.0014
    assert signs(records) == []
    records.append({**records[-1], "step": 400})
    assert [sign.name for sign in signs(records)] == ["the held-out targets"]
