"""State that belongs to targets: when it moves, and what a checkpoint says of it."""

import json
from pathlib import Path
from typing import Any

import host_syncs
import pytest
import tiny_models
import torch
from target_engines import engines, saved

from d2v_scale.checkpoint import training
from d2v_scale.checkpoint.format import Manifest
from d2v_scale.errors import CheckpointError, NewerFormatError
from d2v_scale.networks.draw import Draw
from d2v_scale.pretraining.step import PREDICTIONS, TARGETS, collapse_statistics, train_step
from d2v_scale.recipe import Recipe
from d2v_scale.teacher import target_state

pytestmark = pytest.mark.usefixtures("world_of_one")

PLAIN = {"kind": "average_top_k", "top_k_layers": 2}
WHITENED = {"kind": "whitened", "top_k_layers": 2}


def step(student: Any, teacher: Any, recipe: Recipe, name: str, number: int, poison: bool = False) -> Any:
    batch = tiny_models.batch(name, 2, recipe.objective.masking.clones, seed=number)
    if poison:
        batch.inputs.fill_(float("nan"))
    return train_step(student, teacher, [batch], recipe.objective, Draw(1, number), observe=True)


def test_state_moves_if_and_only_if_the_optimizer_stepped_and_stays_fp32() -> None:
    student, teacher, recipe = engines("v2_vision", WHITENED, "bf16")
    begun = {name: x.clone() for name, x in target_state.named(teacher).items()}
    result, _ = step(student, teacher, recipe, "v2_vision", 0, poison=True)
    assert not result.applied
    now = target_state.named(teacher)
    assert all(torch.equal(now[name], x) for name, x in begun.items())
    result, _ = step(student, teacher, recipe, "v2_vision", 1)
    assert result.applied
    assert not torch.equal(now["target.vision.mean"], begun["target.vision.mean"])
    assert {x.dtype for x in now.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["whitened", "full", "codes", "input"])
def test_no_target_waits_for_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target: dict[str, Any] = {"kind": kind} if kind == "input" else {"kind": kind, "top_k_layers": 2}
    target = {**WHITENED, "options": {"covariance": "full"}} if kind == "full" else target
    student, teacher, recipe = engines("v1_speech", target, "bf16")
    batch = tiny_models.batch("v1_speech", 2, padded=True)
    with host_syncs.recorded(monkeypatch) as syncs:
        for number in range(4):
            syncs.ignoring = number < 2
            train_step(student, teacher, [batch], recipe.objective, Draw(1, number), observe=False)
        syncs.ignoring = True
    assert not syncs.found, syncs


def test_health_is_judged_on_raw_taps() -> None:
    """Whitened targets always have spread 1, collapsed or not."""
    student, teacher, recipe = engines("v1_text", {**WHITENED, "layer_norm": "none"})
    for number in range(3):
        _, seen = step(student, teacher, recipe, "v1_text", number)
    [made] = teacher.make(tiny_models.batch("v1_text", 2), None)
    spread = float(collapse_statistics(seen, student.topology)["target_std"])
    assert spread == pytest.approx(float(made.raw_btd.std((0, 1)).mean()), rel=0.5)
    assert float(made.targets_btd.std((0, 1)).mean()) == pytest.approx(1, rel=0.5)
    assert abs(spread - 1) > 0.2


def test_a_target_of_another_width_has_a_predictor_of_its_own_width() -> None:
    student, teacher, recipe = engines("v2_vision", {"kind": "input"})
    result, seen = step(student, teacher, recipe, "v2_vision", 0)
    assert result.applied
    assert [seen.moments[what].numel() for what in (TARGETS, PREDICTIONS)] == [97, 97]
    assert dict(student.module.named_parameters())["predictors.vision.proj.weight"].shape == (48, 32)
    assert collapse_statistics(seen, student.topology)["target_std"] > 0.1


def test_a_checkpoint_with_state_is_read_by_a_run_with_the_same_state_only(tmp_path: Path) -> None:
    student, teacher, recipe = engines("v1_text", WHITENED)
    step(student, teacher, recipe, "v1_text", 0)
    checkpoint = saved(tmp_path / "whitened", student, teacher)
    names = [f"target.text.{name}" for name in ("mean", "variance", "weight")]
    assert checkpoint.names("state") == names
    for target, said in ((PLAIN, "unexpected: target.text.mean"), ({**PLAIN, "kind": "codes"}, "missing: target.text")):
        other, follower, _ = engines("v1_text", target)
        with pytest.raises(CheckpointError, match=said):
            training.restore(checkpoint, other, follower)
        with pytest.raises(CheckpointError, match=said):
            training.restore_weights(checkpoint, other, follower)
        training.restore_weights(checkpoint, other, follower, reset_teacher=True)
    fresh, follower, _ = engines("v1_text", WHITENED)
    training.restore(checkpoint, fresh, follower)
    for name in names:
        assert torch.equal(target_state.named(follower)[name], target_state.named(teacher)[name])


def test_state_of_another_shape_is_refused(tmp_path: Path) -> None:
    book = {**PLAIN, "kind": "codes", "options": {"codes": 4}}
    student, teacher, recipe = engines("v1_text", book)
    step(student, teacher, recipe, "v1_text", 0)
    checkpoint = saved(tmp_path, student, teacher)
    other, follower, _ = engines("v1_text", {**book, "options": {"codes": 5}})
    with pytest.raises(CheckpointError, match=r"other shape: target.text.used is \(4,\), not \(5,\)"):
        training.restore(checkpoint, other, follower)


def test_weights_without_state_begin_one(tmp_path: Path) -> None:
    student, teacher, recipe = engines("v1_text", PLAIN)
    step(student, teacher, recipe, "v1_text", 0)
    checkpoint = saved(tmp_path, student, teacher)
    assert "state" not in checkpoint.kinds()
    other, follower, _ = engines("v1_text", WHITENED)
    with pytest.raises(CheckpointError, match=r"missing: target\.text\.mean"):
        training.restore(checkpoint, other, follower)
    training.restore_weights(checkpoint, other, follower)
    assert float(target_state.named(follower)["target.text.weight"]) == 0


def test_a_manifest_with_a_kind_that_nobody_here_reads_is_refused(tmp_path: Path) -> None:
    """A later version's section would be passed over in silence."""
    body = json.loads(Manifest(step=1, files=[], tensors={"student": {}}, state={}, extra={}).to_json())
    body["tensors"]["memory"] = {}
    with pytest.raises(NewerFormatError, match="holds memory"):
        Manifest.from_json(json.dumps(body), tmp_path)
