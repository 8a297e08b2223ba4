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
    case("z3_device", 3, accumulation=2, count_collectives=True),
    case("z3_cpu", 3, placement="cpu", count_collectives=True),
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
HALF = 3
RESUMED = [
    # Saved at half and at the end; `test_resume_is_bitwise` goes on from the half.
    case(
        f"resume_z{stage}_{precision}_{placement}",
        stage,
        precision=precision,
        placement=placement,
        zero=zero,
        accumulation=2,
        save_at=HALF,
    )
    for stage, precision, placement, zero in [
        (1, "fp32", "device", {}),
        (1, "bf16", "cpu", {}),
        (2, "fp32", "cpu", OFFLOAD),
        (3, "fp32", "cpu", OFFLOAD_ALL),
        (3, "bf16", "device", {}),
    ]
]
REAL = {"model": "real", "accumulation": 2}
# By the world size that loads: what, into which stage, where the teacher then is.
CHANGED = {
    4: [("z3_to_w4_z1", 1, "device"), ("z1_to_w4_z3", 3, "cpu")],
    3: [("z3_to_w3_z2", 2, "cpu"), ("z1_to_w3_z3", 3, "device")],
    1: [("z3_to_w1_z1", 1, "cpu"), ("z1_to_w1_z3", 3, "device")],
}
FROZEN = [case("frozen_teacher", 3, decay=1.0)]


def launch(world_size: int, cases: list[dict], folder: Path) -> None:
    for one in cases:
        one["out"] = str(folder / one["name"])
    path = folder / f"cases_{world_size}_{cases[0]['name']}.json"
    path.write_text(json.dumps(cases))
    run_ranks(world_size, WORKER, str(path))


def half_way(folder: Path | str, name: str) -> Path:
    return Path(folder, name, f"step-{HALF:08d}")


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
    for whole in RESUMED:
        rest = {**whole, "steps": [HALF, STEPS], "load": str(half_way(folder, whole["name"]))}
        del rest["save_at"]
        parts += [whole, {**rest, "name": f"{whole['name']}_rest"}]
        if whole["stage"] == 3:
            parts.append({**rest, "name": f"{whole['name']}_late", "warm_up": [0, 2]})
    launch(2, [*EXACT_2, *FROZEN, *POISONED, *parts], folder)
    sliced = [case(f"tensor2_z{stage}", stage, **REAL, tensor=2) for stage in (1, 3)]
    sliced[1]["placement"] = "cpu"
    launch(2, sliced, folder)
    from_slices = f"{folder}/tensor2_z3/step-{STEPS:08d}"
    z3 = str(half_way(folder, "resume_z3_fp32_cpu"))
    for world_size in (4, 3, 1):
        cases = [*EXACT_4] if world_size == 4 else []
        for name, stage, placement in CHANGED[world_size]:
            keys = {"load": str(half_way(folder, origin(name))), "placement": placement, "save_at": HALF}
            cases.append({**case(name, stage, **keys), "steps": [HALF, STEPS]})
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


def origin(name: str) -> str:
    """The run that a case of CHANGED goes on from."""
    return "resume_z3_fp32_cpu" if name.startswith("z3") else "resume_z1_fp32_device"


EXACT_HALVES = [one for one in RESUMED if one["precision"] == "fp32"]


@pytest.mark.parametrize("one", [*EXACT_2, *EXACT_HALVES, *EXACT_4], ids=lambda c: c["name"])
def test_equals_a_plain_loop(folder: Path, one: dict) -> None:
    expected, found = toy.reference(toy.Settings()), newest(folder, one["name"])
    assert distance(found, expected["student"], "student") < 2e-6
    assert distance(found, expected["teacher"], "teacher") < 2e-6
    assert found.extra["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found.extra["norms"] == pytest.approx(expected["norms"], rel=1e-6)
    assert found.extra["parts"] == pytest.approx(expected["parts"], rel=1e-3)


def test_teacher_health_is_measured(folder: Path) -> None:
    expected, found = toy.reference(toy.Settings()), newest(folder, "resume_z3_fp32_cpu")
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


@pytest.mark.parametrize("name", [one["name"] for one in RESUMED])
def test_resume_is_bitwise(folder: Path, name: str) -> None:
    check_resumed(newest(folder, name), Checkpoint.open(half_way(folder, name)), newest(folder, f"{name}_rest"))


@pytest.mark.parametrize("name", [one["name"] for one in RESUMED if one["stage"] == 3])
def test_restoring_into_used_engines_leaves_nothing_stale(folder: Path, name: str) -> None:
    check_resumed(newest(folder, name), Checkpoint.open(half_way(folder, name)), newest(folder, f"{name}_late"))


def check_resumed(whole: Checkpoint, half: Checkpoint, rest: Checkpoint) -> None:
    assert half.extra["losses"] + rest.extra["losses"] == whole.extra["losses"]
    assert half.extra["norms"] + rest.extra["norms"] == whole.extra["norms"]
    for kind in whole.kinds():
        for tensor in whole.names(kind):
            assert torch.equal(whole.tensor(kind, tensor), rest.tensor(kind, tensor)), (kind, tensor)


@pytest.mark.parametrize("name", [name for changes in CHANGED.values() for name, *_ in changes])
def test_loads_at_another_world_size_and_stage(folder: Path, name: str) -> None:
    half, whole = Checkpoint.open(half_way(folder, origin(name))), newest(folder, origin(name))
    loaded, trained = Checkpoint.open(half_way(folder, name)), newest(folder, name)
    assert set(loaded.kinds()) == {"student", "exp_avg", "exp_avg_sq", "teacher"}
    for kind in half.kinds():
        for tensor in half.names(kind):
            assert torch.equal(half.tensor(kind, tensor), loaded.tensor(kind, tensor)), (kind, tensor)
    for kind in ("student", "teacher"):
        assert distance(trained, {n: whole.tensor(kind, n) for n in whole.names(kind)}, kind) < 2e-6
    assert trained.extra["losses"] == pytest.approx(whole.extra["losses"][HALF:], rel=2e-6)


def test_a_new_run_from_weights(folder: Path) -> None:
    source = Checkpoint.open(half_way(folder, "resume_z3_fp32_cpu"))
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
