"""Student and teacher engines against a plain loop, on 1 to 4 gloo ranks; checkpoints across world sizes and stages."""

import json
from pathlib import Path

import pytest
import torch
import toy_model as toy
from launch import run_ranks

from d2v_scale.checkpoint import Checkpoint, find_newest_valid

WORKER = Path(__file__).with_name("engine_worker.py")
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu"}}
STEPS = toy.Settings().steps


def case(name: str, stage: int, **keys) -> dict:
    return {"name": name, "stage": stage, "steps": [0, STEPS], **keys}


EXACT_2 = [
    case("z1_device", 1, count_collectives=True),
    case("z1_cpu_accumulate", 1, accumulation=3, placement="cpu"),
    case("z2_device_accumulate", 2, accumulation=2),
    case("z2_cpu_offload", 2, accumulation=2, placement="cpu", zero=OFFLOAD),
    case("z3_device", 3, accumulation=2, count_collectives=True),
    case("z3_cpu", 3, placement="cpu", count_collectives=True),
    case("z3_cpu_offload", 3, accumulation=2, placement="cpu", zero=OFFLOAD_ALL),
]
EXACT_4 = [
    case("w4_z1_cpu", 1, placement="cpu"),
    case("w4_z2_device", 2, accumulation=3),
    case("w4_z3_device", 3),
    case("w4_z3_cpu", 3, accumulation=3, placement="cpu"),
]
POISON = {
    "nan": {"kind": "gradient", "value": "nan"},
    "inf": {"kind": "gradient", "value": "inf"},
    "constant": {"kind": "constant", "value": "nan"},
}
POISONED = [
    case(
        f"poison_{how}_z{stage}_{precision}{'_offload' if zero else ''}",
        stage,
        accumulation=2,
        precision=precision,
        zero=zero,
        placement="cpu" if stage == 2 else "device",
        poison={"step": 2, "rank": 1, **POISON[how]},
    )
    for stage, how, precision, zero in [
        (1, "nan", "fp32", {}),
        (1, "constant", "fp32", OFFLOAD),
        (1, "inf", "bf16", {}),
        (1, "nan", "bf16", OFFLOAD),
        (2, "inf", "fp32", {}),
        (2, "nan", "fp32", OFFLOAD),
        (2, "constant", "bf16", {}),
        (3, "constant", "fp32", {}),
        (3, "inf", "fp32", OFFLOAD_ALL),
        (3, "nan", "bf16", {}),
        (3, "inf", "bf16", OFFLOAD),
    ]
]
RESUMED = [
    (f"resume_z{stage}_{precision}_{placement}", stage, precision, placement, zero)
    for stage, precision, placement, zero in [
        (1, "fp32", "device", {}),
        (1, "bf16", "cpu", {}),
        (2, "fp32", "cpu", OFFLOAD),
        (3, "fp32", "cpu", OFFLOAD_ALL),
        (3, "bf16", "device", {}),
    ]
]
REAL = {"model": "real", "accumulation": 2}
FROZEN = [case("frozen_teacher", 3, decay=1.0)]


def launch(world_size: int, cases: list[dict], folder: Path) -> None:
    for one in cases:
        one["out"] = str(folder / one["name"])
    path = folder / f"cases_{world_size}_{cases[0]['name']}.json"
    path.write_text(json.dumps(cases))
    run_ranks(world_size, WORKER, str(path))


def newest(folder: Path, name: str) -> Checkpoint:
    found, skipped = find_newest_valid(folder / name)
    assert found is not None
    assert not skipped
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs: two ranks first, then the loads at other world sizes."""
    folder = tmp_path_factory.mktemp("engine")
    parts = []
    for name, stage, precision, placement, zero in RESUMED:
        keys = {"precision": precision, "placement": placement, "zero": zero, "accumulation": 2}
        half = f"{folder}/{name}_half/step-{3:08d}"
        parts += [
            case(f"{name}_whole", stage, **keys),
            {**case(f"{name}_half", stage, **keys), "steps": [0, 3]},
            {**case(f"{name}_rest", stage, **keys), "steps": [3, STEPS], "load": half},
        ]
        if stage == 3:
            late = {"steps": [3, STEPS], "load": half, "warm_up": [0, 2]}
            parts.append({**case(f"{name}_late", stage, **keys), **late})
    launch(2, [*EXACT_2, *FROZEN, *POISONED, *parts], folder)
    sliced = [case(f"tensor2_z{stage}", stage, **REAL, tensor=2) for stage in (1, 3)]
    sliced[1]["placement"] = "cpu"
    launch(2, sliced, folder)
    from_slices = f"{folder}/tensor2_z3/step-{STEPS:08d}"
    z3, z1 = f"{folder}/resume_z3_fp32_cpu_half/step-{3:08d}", f"{folder}/resume_z1_fp32_device_half/step-{3:08d}"
    loads = {
        4: [("z3_to_w4_z1", z3, 1), ("z1_to_w4_z3", z1, 3)],
        3: [("z3_to_w3_z2", z3, 2), ("z1_to_w3_z3", z1, 3)],
        1: [("z3_to_w1_z1", z3, 1), ("z1_to_w1_z3", z1, 3)],
    }
    for world_size, changes in loads.items():
        cases = [*EXACT_4] if world_size == 4 else []
        for name, source, stage in changes:
            cases.append({**case(f"{name}_loaded", stage, load=source), "steps": [3, 3]})
            cases.append({**case(f"{name}_trained", stage, load=source, placement="cpu"), "steps": [3, STEPS]})
        if world_size == 1:
            cases.append({**case("from_weights", 1, load=z3, weights_only=True), "steps": [0, 0]})
            cases.append(case("whole_z1", 1, **REAL))
            cases.append({**case("tensor2_to_w1", 1, model="real", load=from_slices), "steps": [STEPS, STEPS]})
            cases.append({**case("reset_teacher", 3, load=z3, weights_only=True, reset_teacher=True), "steps": [0, 0]})
        launch(world_size, cases, folder)
    return folder


def distance(checkpoint: Checkpoint, expected: dict[str, torch.Tensor], kind: str) -> float:
    assert set(checkpoint.names(kind)) == set(expected)
    return max(float((checkpoint.tensor(kind, n) - expected[n]).abs().max()) for n in expected)


@pytest.mark.parametrize("one", [*EXACT_2, *EXACT_4], ids=lambda c: c["name"])
def test_equals_a_plain_loop(folder: Path, one: dict) -> None:
    expected, found = toy.reference(toy.Settings()), newest(folder, one["name"])
    assert distance(found, expected["student"], "student") < 2e-6
    assert distance(found, expected["teacher"], "teacher") < 2e-6
    assert found.extra["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found.extra["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert found.extra["parts"] == pytest.approx(expected["parts"], rel=1e-3)


def test_teacher_health_is_measured(folder: Path) -> None:
    expected, found = toy.reference(toy.Settings()), newest(folder, "z3_cpu_offload")
    averaged = [n for n in expected["teacher"] if toy.role(n) == "averaged"]
    gap = torch.cat([(expected["student"][n] - expected["teacher"][n]).flatten() for n in averaged]).norm()
    assert found.extra["health"]["student_teacher_distance"] == pytest.approx(float(gap), rel=1e-4)
    decay = toy.Settings().decay
    assert found.extra["health"]["teacher_update_norm"] == pytest.approx(float(gap) * (1 - decay) / decay, rel=1e-4)


def test_decay_one_leaves_the_teacher_alone_and_counts(folder: Path) -> None:
    found = newest(folder, "frozen_teacher")
    start = toy.Student()
    toy.initialize(start)
    weights = {n: p.detach() for n, p in start.named_parameters()}
    for name in found.names("teacher"):
        assert torch.equal(found.tensor("teacher", name), weights[name])
    assert found.manifest.state["teacher_updates"] == found.manifest.state["completed_updates"] == STEPS


@pytest.mark.parametrize("one", POISONED, ids=lambda c: c["name"])
def test_poisoned_step_changes_nothing_anywhere(folder: Path, one: dict) -> None:
    """The workers assert that not one bit changes; here: it is counted, and what follows is as if it never was."""
    found = newest(folder, one["name"])
    assert found.manifest.state["skipped_updates"] == 1
    assert found.manifest.state["completed_updates"] == STEPS - 1
    assert found.manifest.state["skipped_in_a_row"] == 0
    if one["precision"] == "fp32":
        expected = toy.reference(toy.Settings(), skip=(2,))
        assert distance(found, expected["student"], "student") < 2e-6
        assert distance(found, expected["teacher"], "teacher") < 2e-6


@pytest.mark.parametrize("name", [r[0] for r in RESUMED])
def test_resume_is_bitwise(folder: Path, name: str) -> None:
    check_resumed(*(newest(folder, f"{name}_{part}") for part in ("whole", "half", "rest")))


@pytest.mark.parametrize("name", [r[0] for r in RESUMED if r[1] == 3])
def test_restoring_into_used_engines_leaves_nothing_stale(folder: Path, name: str) -> None:
    check_resumed(*(newest(folder, f"{name}_{part}") for part in ("whole", "half", "late")))


def check_resumed(whole: Checkpoint, half: Checkpoint, rest: Checkpoint) -> None:
    assert half.extra["losses"] + rest.extra["losses"] == whole.extra["losses"]
    assert half.extra["norms"] + rest.extra["norms"] == whole.extra["norms"]
    for kind in whole.kinds():
        for tensor in whole.names(kind):
            assert torch.equal(whole.tensor(kind, tensor), rest.tensor(kind, tensor)), (kind, tensor)


@pytest.mark.parametrize(
    "name", ["z3_to_w4_z1", "z1_to_w4_z3", "z3_to_w3_z2", "z1_to_w3_z3", "z3_to_w1_z1", "z1_to_w1_z3"]
)
def test_loads_at_another_world_size_and_stage(folder: Path, name: str) -> None:
    origin = "resume_z3_fp32_cpu" if name.startswith("z3") else "resume_z1_fp32_device"
    half, whole = newest(folder, f"{origin}_half"), newest(folder, f"{origin}_whole")
    loaded, trained = newest(folder, f"{name}_loaded"), newest(folder, f"{name}_trained")
    assert set(loaded.kinds()) == {"student", "exp_avg", "exp_avg_sq", "teacher"}
    for kind in half.kinds():
        for tensor in half.names(kind):
            assert torch.equal(half.tensor(kind, tensor), loaded.tensor(kind, tensor)), (kind, tensor)
    for kind in ("student", "teacher"):
        assert distance(trained, {n: whole.tensor(kind, n) for n in whole.names(kind)}, kind) < 2e-6
    assert trained.extra["losses"] == pytest.approx(whole.extra["losses"][3:], rel=2e-6)


def test_a_new_run_from_weights(folder: Path) -> None:
    source = newest(folder, "resume_z3_fp32_cpu_half")
    kept, reset = newest(folder, "from_weights"), newest(folder, "reset_teacher")
    for found in (kept, reset):
        assert found.manifest.state["completed_updates"] == 0
        for tensor in source.names("student"):
            assert torch.equal(found.tensor("student", tensor), source.tensor("student", tensor))
            assert not found.tensor("exp_avg", tensor).any()
    for tensor in source.names("teacher"):
        assert torch.equal(kept.tensor("teacher", tensor), source.tensor("teacher", tensor))
        assert torch.equal(reset.tensor("teacher", tensor), source.tensor("student", tensor))


@pytest.mark.parametrize("name", ["tensor2_z1", "tensor2_z3"])
def test_tensor_parallel_equals_one_process(folder: Path, name: str) -> None:
    whole, sliced = newest(folder, "whole_z1"), newest(folder, name)
    assert any(entry.slices == 2 for entry in sliced.manifest.tensors["student"].values())
    for kind in ("student", "teacher"):
        assert distance(sliced, {n: whole.tensor(kind, n) for n in whole.names(kind)}, kind) < 2e-5
    assert sliced.extra["losses"] == pytest.approx(whole.extra["losses"], rel=2e-6)
    assert sliced.extra["norms"] == pytest.approx(whole.extra["norms"], rel=1e-5)
    assert sliced.extra["health"] == pytest.approx(whole.extra["health"], rel=1e-3)
    assert sliced.extra["parts"] == pytest.approx(whole.extra["parts"], rel=1e-3)


def test_tensor_parallel_checkpoint_loads_without(folder: Path) -> None:
    sliced, whole = newest(folder, "tensor2_z3"), newest(folder, "tensor2_to_w1")
    for kind in sliced.kinds():
        for tensor in sliced.names(kind):
            assert torch.equal(sliced.tensor(kind, tensor), whole.tensor(kind, tensor)), (kind, tensor)
