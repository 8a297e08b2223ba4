"""From a checkpoint to probe accuracies, without DeepSpeed or a launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2v_scale.checkpoint import write_single
from d2v_scale.conversion.demo import digits
from d2v_scale.errors import CheckpointError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.init import initialize
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import groups
from d2v_scale.recipe import Recipe, to_dict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    model = ModelConfig(
        vision=VisionStem(image_size=16, patch_size=4, channels=1),
        backbone=Backbone(width=32, heads=2, ffn=64, depth=3, norm_first=True, layer_scale=0.1, key_bias=False),
        predictor=Predictor(),
    )
    recipe = Recipe(name="tiny", model=model)
    recipe.objective.target.top_k_layers = 2
    return recipe


def tensors_of(recipe: Recipe, seed: int) -> dict[str, torch.Tensor]:
    groups.single_process()
    student = Student(recipe.model)
    initialize(student, seed)
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def save(path: Path, recipe: Recipe, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> Path:
    return write_single(path, student, teacher, {"recipe": json.loads(json.dumps(to_dict(recipe)))}, step=7)


def test_teacher_values_win_and_student_values_fill_what_is_shared(tmp_path: Path, recipe: Recipe) -> None:
    student, teacher = tensors_of(recipe, 1), tensors_of(recipe, 2)
    shared = {name for name in teacher if name.startswith("stems.vision.features")}
    averaged = {name: tensor for name, tensor in teacher.items() if name not in shared}
    save(tmp_path, recipe, student, averaged)
    loaded = dict(FrozenEncoder.load(tmp_path).model.named_parameters())
    assert shared <= loaded.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter.cpu(), student[name] if name in shared else teacher[name]), name
    assert not any(name.startswith(("predictors", "final_norm")) for name in loaded)
    for name, parameter in FrozenEncoder.load(tmp_path, "student").model.named_parameters():
        assert torch.equal(parameter.cpu(), student[name])


def test_random_weights_are_those_the_run_began_with(tmp_path: Path, recipe: Recipe) -> None:
    save(tmp_path, recipe, tensors_of(recipe, 5), {})
    begun = tensors_of(recipe, recipe.seed)
    for name, parameter in FrozenEncoder.load(tmp_path, "random").model.named_parameters():
        assert torch.equal(parameter.cpu(), begun[name])


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path, recipe: Recipe) -> None:
    student = tensors_of(recipe, 1)
    name = "blocks.1.ffn.fc1.weight"
    save(tmp_path / "a", recipe, {key: tensor for key, tensor in student.items() if key != name}, {})
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*blocks\.1\.ffn\.fc1\.weight"):
        FrozenEncoder.load(tmp_path / "a")
    save(tmp_path / "b", recipe, student | {name: torch.zeros(3)}, {})
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.fc1\.weight is \(3,\)"):
        FrozenEncoder.load(tmp_path / "b")


def test_probe_on_real_digits(tmp_path: Path, recipe: Recipe) -> None:
    digits.write(tmp_path / "digits")
    save(tmp_path / "run" / "checkpoints", recipe, tensors_of(recipe, 1), tensors_of(recipe, 1))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    command = [sys.executable, str(ROOT / "tools" / "probe.py"), str(tmp_path / "run"), "--task", "linear"]
    command += ["--data", str(tmp_path / "digits" / "train-*.tar"), "--test", str(tmp_path / "digits" / "test-*.tar")]
    command += ["--limit", "300", "--out", str(tmp_path / "result.json")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step"] == 7
    assert set(result["accuracy"]) == {"layer 1", "layer 2", "layer 3", "mean of the last 4", "learned combination"}
    assert max(result["accuracy"].values()) > 3 * result["chance"]
    assert "layer 3" in done.stdout
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "mlflow_events.jsonl").read_text().splitlines()]
    assert event["values"]["probe/layer 3"] == result["accuracy"]["layer 3"]
