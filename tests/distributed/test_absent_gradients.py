"""What a step leaves out has gradient zero: a stem of another modality, a dropped block, at every stage and offload."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.conversion import demo
from d2v_scale.run_files.committed import directory_name

WORKER = Path(__file__).with_name("absent_worker.py")
RECIPE = Path(__file__).with_name("joint.yaml")
STEPS = 12
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD, "offload_param": {"device": "cpu"}}
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero1 offload": {"stage": 1, **OFFLOAD},
    "zero2": {"stage": 2},
    "zero2 offload": {"stage": 2, **OFFLOAD},
    "zero3": {"stage": 3},
    "zero3 offload optimizer": {"stage": 3, **OFFLOAD},
    "zero3 offload": {"stage": 3, **OFFLOAD_ALL},
    "zero3 sub-groups": {"stage": 3, "sub_group_size": 2000, "stage3_param_persistence_threshold": 0, **OFFLOAD},
    "round robin offload": {"stage": 2, "round_robin_gradients": True, **OFFLOAD},
}
SMALL = {
    "global_batch_size": 8,
    "accumulation": 2,
    "model.backbone.width": 48,
    "model.backbone.ffn": 96,
    "model.backbone.depth": 3,
    "model.predictor.width": 48,
}
TOGETHER = ("zero1", "zero2 offload", "zero3 offload")
VISION = {"data.sources": "[{shards: demo_data/vision/train.index.json, modality: vision}]"}
DROPPED = {**SMALL, **VISION, "model.backbone.layer_drop": 0.4}


def case(name: str, zero: str, recipe: dict[str, Any], **keys: Any) -> dict[str, Any]:
    arguments = ["--recipe", str(RECIPE), *(f"--{key}={value}" for key, value in recipe.items())]
    return {"name": f"{name} {zero}", "recipe": arguments, "zero": ZERO[zero], "steps": [0, STEPS], **keys}


def train(root: Path, world_size: int, cases: list[dict[str, Any]], timeout: float = 600) -> dict[str, Checkpoint]:
    """Run the cases in one launch; the checkpoint of each."""
    for one in cases:
        one["out"] = str(root / f"{world_size} {one['name']}".replace(" ", "_"))
    listed = root / f"cases-{world_size}-{len(cases)}.json"
    listed.write_text(json.dumps(cases))
    run_ranks(world_size, WORKER, str(listed), timeout=timeout)
    found = {one["name"]: find_newest_valid(Path(one["out"]))[0] for one in cases}
    assert all(found.values()), found
    return found  # type: ignore[return-value]


def same_training(found: Checkpoint, reference: Checkpoint, loss: float = 1e-6, norm: float = 1e-5) -> None:
    assert found.extra["sources"] == reference.extra["sources"]
    assert found.extra["losses"] == pytest.approx(reference.extra["losses"], rel=loss)
    assert found.extra["norms"] == pytest.approx(reference.extra["norms"], rel=norm)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo.ensure(f"demo_data/{modality}/train.index.json" for modality in ("vision", "speech", "text"))
    return tmp_path_factory.mktemp("absent")


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, Checkpoint]:
    """ZeRO-1 on one rank."""
    cases = [
        case("stems", "zero1", SMALL),
        case("dropped", "zero1", DROPPED, steps=[0, 6]),
    ]
    return {name.split()[0]: found for name, found in train(root, 1, cases).items()}


def test_absent_stems_and_dropped_blocks_have_no_old_gradient(root: Path, references: dict[str, Checkpoint]) -> None:
    cases = [
        case("stems", "zero2 offload", SMALL),
        case("stems", "zero3", SMALL),
        case("stems", "zero3 offload", SMALL),
        case("dropped", "zero3", DROPPED, steps=[0, 6]),
        *(case("together", zero, SMALL, together=True, steps=[0, 6]) for zero in TOGETHER),
        case("dropped", "zero1 offload", {**DROPPED, "parallel.pipeline": 2}, steps=[0, 6]),
    ]
    found = train(root, 2, cases)
    # Of a step's micro-batches two ranks have other samples than one.
    references["together"] = found["together zero1"]
    assert set(references["stems"].extra["sources"]) == {"vision", "speech", "text"}
    for name, checkpoint in found.items():
        same_training(checkpoint, references[name.split()[0]])


def lines_of_cases() -> list[tuple[str, dict[str, Any]]]:
    """Recipes by name: as published, several micro-batches, no clipping, small."""
    return [
        ("whole", {}),
        ("small", SMALL),
        ("unclipped", {**SMALL, "optim.clip": 0.0}),
        ("once", {**SMALL, "accumulation": 1}),
        ("dropped", DROPPED),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", [name for name, _ in lines_of_cases()])
def test_every_stage_and_offload_trains_alike(root: Path, name: str, world_size: int) -> None:
    recipe = dict(lines_of_cases())[name]
    (reference,) = train(root, 1, [case(f"{name} alone", "zero1", recipe)]).values()
    found = train(root, world_size, [case(name, zero, recipe) for zero in ZERO], timeout=1800)
    for checkpoint in found.values():
        same_training(checkpoint, reference)


@pytest.mark.slow
def test_bf16_differs_by_its_rounding_only(root: Path) -> None:
    """An old gradient makes a difference of several per cent."""
    recipe = {**SMALL, "precision": "bf16"}
    found = train(root, 2, [case("bf16", zero, recipe) for zero in ZERO if zero != "zero1"], timeout=1800)
    for checkpoint in found.values():
        same_training(checkpoint, found["bf16 zero2"], loss=2e-3, norm=5e-2)


@pytest.mark.slow
def test_tensor_parallel_steps_of_one_modality(root: Path, references: dict[str, Checkpoint]) -> None:
    recipe = {**SMALL, "parallel.tensor": 2}
    found = train(root, 2, [case("stems", zero, recipe) for zero in ("zero2 offload", "zero3", "zero3 offload")])
    for checkpoint in found.values():
        same_training(checkpoint, references["stems"], loss=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2 offload", "zero3", "zero3 offload"])
def test_a_resumed_run_of_several_stems_goes_on_bitwise(root: Path, zero: str) -> None:
    """The buffers of a new engine hold nothing, those of the old one held the last gradients."""
    half = case(f"half {zero}", zero, SMALL, steps=[0, 7])
    whole = case(f"whole {zero}", zero, SMALL)
    train(root, 2, [half, whole])
    rest = case(f"rest {zero}", zero, SMALL, steps=[7, STEPS], load=str(Path(half["out"]) / directory_name(7)))
    found = train(root, 2, [rest])[rest["name"]]
    expected, _ = find_newest_valid(Path(whole["out"]))
    assert expected is not None
    assert found.extra["losses"] == expected.extra["losses"][7:]
    for kind in expected.kinds():
        for name in expected.names(kind):
            assert torch.equal(found.tensor(kind, name), expected.tensor(kind, name)), (kind, name)
