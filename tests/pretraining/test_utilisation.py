"""d2v_scale.pretraining.utilisation: the FLOPs of what was trained on, over time and peak."""

import dataclasses

import pytest
import tiny_models

from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.parallel import groups
from d2v_scale.planning import hardware
from d2v_scale.planning.flops import sample_cost
from d2v_scale.pretraining.utilisation import FlopMeter, lengths_of_batch


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.ARRAYS])
def test_a_step_counts_every_sample_at_its_lengths(name: str) -> None:
    config, topology = tiny_models.model(name), groups.single_process()
    clones = 2 if config.visible_only else 1
    batches = [tiny_models.batch(name, samples=n, clones=clones) for n in (3, 2)]
    meter = FlopMeter(config, TeacherParts(), topology, peak_tflops=1e-3)
    meter.count(batches)
    costs = [
        (len(b.inputs), sample_cost(config, b.modality, lengths_of_batch(b, config.visible_only), TeacherParts()))
        for b in batches
    ]
    figures = meter.figures(elapsed_s=2.0)
    total = sum(n * cost.total for n, cost in costs)
    assert figures["tflops_per_device"] == pytest.approx(total / 2 / 1e12)
    assert figures["mfu"] == pytest.approx(total / 2 / 1e9)
    assert figures["mfu_student"] == pytest.approx(sum(n * cost.student_only for n, cost in costs) / 2 / 1e9)
    assert 0 < figures["mfu_student"] < figures["mfu"]
    assert meter.figures(1.0)["mfu"] == 0, "counted since the last call"


def test_visible_positions_are_cheaper_and_longer_samples_dearer() -> None:
    batch = tiny_models.batch("v2_vision", clones=2)
    lengths = lengths_of_batch(batch, visible_only=True)
    assert lengths.kept < lengths.positions
    assert (lengths.clones, lengths.extra) == (2, 1)
    assert lengths_of_batch(batch, visible_only=False) == dataclasses.replace(lengths, kept=lengths.positions)


def test_steps_that_a_run_takes_back_do_not_count() -> None:
    meter = FlopMeter(tiny_models.model("v1_text"), TeacherParts(), groups.single_process())
    meter.count([tiny_models.batch("v1_text")])
    meter.restart()
    assert meter.figures(1.0)["tflops_per_device"] == 0


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    meter = FlopMeter(tiny_models.model("v1_text"), TeacherParts(), groups.single_process())
    meter.count([tiny_models.batch("v1_text")])
    assert set(meter.figures(1.0)) == {"tflops_per_device"}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_cards_of_one_kind_have_their_own_peaks(name: str, tflops: float | None) -> None:
    assert hardware.bf16_peak(name) == (None if tflops is None else tflops * 1e12)
