"""The state of targets: how it moves over replicas and stages, and its way through checkpoints."""

from pathlib import Path

import pytest
import torch
from test_topologies import LIMITS, differences, path, train

from d2v_scale.checkpoint import Checkpoint

WHITENED = {"model": "v1_text", "target": {"kind": "whitened", "options": {"momentum": 0.9}}}
CODES = {"model": "v2_speech", "target": {"kind": "codes", "options": {"codes": 6, "momentum": 0.9}}}
PIXELS = {"model": "v1_vision", "target": {"kind": "input"}}
SEVERAL = {
    "model": "v2_vision",
    "target": {"weight": 2.0},
    "further": [
        {"kind": "codes", "weight": 0.5, "top_k_layers": 2, "options": {"codes": 4, "momentum": 0.9}},
        {"kind": "input", "weight": 0.25},
        {"kind": "whitened", "name": "early", "layers": [0], "options": {"momentum": 0.9, "covariance": "full"}},
    ],
}
PIPELINE = {"pipeline": 2, "accumulation": 4}
ZERO_1 = {"accumulation": 2}
ZERO_3 = {"stage": 3, "accumulation": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("target_state")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Checkpoint]:
    """What one process computes; `moved on` goes on with what two ranks saved."""
    cases = [{"name": "whitened", **WHITENED}, {"name": "codes", **CODES}, {"name": "pixels", **PIXELS}]
    cases += [{"name": "several", **SEVERAL}, {"name": "begun_alone", "steps": [0, 2], **SEVERAL}]
    return train(root, 1, [{"accumulation": 4, "steps": [0, 4], **case} for case in cases])


@pytest.fixture(scope="module")
def on_two_ranks(root: Path, alone: dict[str, Checkpoint]) -> dict[str, Checkpoint]:
    """All in one launch. `kept`: loaded and saved again, without a step; `grown`: begun by one process."""
    assert "begun_alone" in alone
    begun = {"steps": [0, 2], **WHITENED}
    cases = [
        {"name": "codes zero1", "steps": [0, 4], **CODES, **ZERO_1},
        {"name": "pixels pp2", "steps": [0, 4], **PIXELS, **PIPELINE},
        {"name": "whitened pp2", "steps": [0, 4], **WHITENED, **PIPELINE},
        {"name": "begun", **begun, **PIPELINE},
        {"name": "kept", "steps": [2, 2], "load": path(root, "begun", 2), **WHITENED, **ZERO_3},
        {"name": "whitened zero3", "steps": [2, 4], "load": path(root, "kept", 2), **WHITENED, **ZERO_3},
        {"name": "several pp2", "steps": [0, 4], **SEVERAL, **PIPELINE},
        {"name": "several zero2", "steps": [0, 4], "stage": 2, **SEVERAL, **ZERO_1},
        {"name": "several zero3", "steps": [0, 4], **SEVERAL, **ZERO_3},
        {"name": "several tp2", "steps": [0, 4], "tensor": 2, "accumulation": 4, **SEVERAL},
        {"name": "begun_in_two", "steps": [0, 2], **SEVERAL, **PIPELINE},
        {"name": "grown", "steps": [2, 4], "load": path(root, "begun_alone", 2), **SEVERAL, **ZERO_3},
        {"name": "whitened again", "steps": [2, 4], "load": path(root, "begun", 2), **WHITENED, **PIPELINE},
    ]
    return train(root, 2, cases)


def test_replicas_and_stages_move_the_state_as_one_process_does(
    alone: dict[str, Checkpoint], on_two_ranks: dict[str, Checkpoint]
) -> None:
    several = [f"several {how}" for how in ("pp2", "zero2", "zero3", "tp2")]
    for name in ("codes zero1", "pixels pp2", "whitened pp2", *several):
        ours, reference = on_two_ranks[name], alone[name.split()[0]]
        found = differences(ours, reference)
        assert {what: found[what] for what in LIMITS if found[what] > LIMITS[what]} == {}, name
        assert ours.names("state") == reference.names("state")
        for state in reference.names("state"):
            torch.testing.assert_close(ours.tensor("state", state), reference.tensor("state", state), atol=2e-4, rtol=0)
    assert alone["whitened"].names("state") == [f"target.text.{n}" for n in ("mean", "variance", "weight")]
    assert alone["whitened"].tensor("state", "target.text.weight") == pytest.approx(1 - 0.9**4)
    assert float(alone["codes"].tensor("state", "target.speech.used").sum()) > 1
    assert alone["pixels"].names("state") == []
    parts = {"codes": ("used", "count", "sum"), "early": ("mean", "covariance", "weight")}
    names = [f"target.vision.{target}.{part}" for target, each in parts.items() for part in each]
    assert sorted(alone["several"].names("state")) == sorted(names)
    assert {"held_out_loss/target_early", "held_out_explained/target_input"} <= alone["several"].extra["figures"].keys()


def test_state_goes_through_checkpoints_bit_for_bit(on_two_ranks: dict[str, Checkpoint]) -> None:
    """From a pipeline to ZeRO-3 and on, and back into a pipeline."""
    begun, kept = on_two_ranks["begun"], on_two_ranks["kept"]
    for name in begun.names("state"):
        assert torch.equal(begun.tensor("state", name), kept.tensor("state", name))
    straight, again, other = (on_two_ranks[f"whitened {how}"] for how in ("pp2", "again", "zero3"))
    for kind in straight.kinds():
        for name in straight.names(kind):
            assert torch.equal(straight.tensor(kind, name), again.tensor(kind, name)), (kind, name)
    for name in straight.names("state"):
        torch.testing.assert_close(other.tensor("state", name), straight.tensor("state", name), atol=2e-4, rtol=0)


def test_a_run_with_several_states_goes_on_at_another_world_size(
    root: Path, alone: dict[str, Checkpoint], on_two_ranks: dict[str, Checkpoint]
) -> None:
    """One process to two at ZeRO-3, and two of a pipeline to one: as one process that never stopped."""
    half = {"name": "shrunk", "steps": [2, 4], "accumulation": 4, "load": path(root, "begun_in_two", 2), **SEVERAL}
    assert on_two_ranks["begun_in_two"].names("state") == alone["begun_alone"].names("state")
    shrunk = train(root, 1, [half])["shrunk"]
    for other in (on_two_ranks["grown"], shrunk):
        for kind, limit in (("student", LIMITS["student"]), ("teacher", LIMITS["teacher"]), ("state", 2e-4)):
            assert other.names(kind) == alone["several"].names(kind)
            for name in other.names(kind):
                torch.testing.assert_close(
                    other.tensor(kind, name), alone["several"].tensor(kind, name), atol=limit, rtol=0
                )
