"""Fine-tuned models through the tool: the exported class gives our logits, and its processor reads and writes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from d2v_scale.checkpoint import write_single
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.recipe import Recipe, to_dict

TOOLS = Path(__file__).parents[2] / "tools"
CTC = TaskConfig(kind="ctc", ctc=CtcConfig(letters="abc"))
CASES = [
    *[(name, TaskConfig(classes=3)) for name in tiny_models.NAMES],
    ("v1_speech", CTC),
    ("v2_speech", CTC),
    ("v1_text", TaskConfig(kind="regress")),
]


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def export(*arguments: object) -> int:
    spec = importlib.util.spec_from_file_location("export", TOOLS / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def tuned(name: str, task: TaskConfig, tmp_path: Path) -> Path:
    """A run directory with a fine-tuned model of random weights."""
    torch.manual_seed(0)
    recipe = Recipe(
        name=name,
        model=tiny_models.model(name),
        task=task,
        objective=ObjectiveConfig(target=tiny_models.target_of(name)),
    )
    shapes = {n: p.shape for n, p in TaskModel(recipe.model, task).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + (n.endswith("norm1.weight")) for n, shape in shapes.items()}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe))), "classes": ["ant", "bee", "cow"]}
    write_single(tmp_path / "run" / "checkpoints", student, None, extra)
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_exported_folder_gives_our_logits(
    name: str, task: TaskConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tuned(name, task, tmp_path), tmp_path / "hf"
    assert export(run, out) == 0
    assert "PASS" in capsys.readouterr().out
    settings = json.loads((out / "config.json").read_text())
    if task.kind == "classify":
        assert settings["id2label"] == {"0": "ant", "1": "bee", "2": "cow"}
    # And we read it back, with its head.
    batch = tiny_models.batch(name)
    ours, again = TaskPredictor.load(run), TaskPredictor.load(out)
    assert torch.allclose(ours.logits(batch), again.logits(batch), atol=1e-6)


def test_a_wrong_head_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v_scale.interop import exporting

    write = exporting.write_tensors

    def spoil(tensors, out: Path) -> None:  # type: ignore[no-untyped-def]
        write(((n, t + 1e-2 if n == "classifier.bias" else t) for n, t in tensors), out)

    monkeypatch.setattr(exporting, "write_tensors", spoil)
    assert export(tuned("v1_vision", TaskConfig(classes=3), tmp_path), tmp_path / "hf") == 1


def test_the_processor_of_a_ctc_model_prepares_waves_and_reads_characters(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    out = tmp_path / "hf"
    assert export(tuned("v1_speech", CTC, tmp_path), out) == 0
    processor = AutoProcessor.from_pretrained(out)
    wave = np.random.default_rng(0).normal(3.0, 2.0, 4000).astype(np.float32)
    values = processor(wave, sampling_rate=16000, return_tensors="pt").input_values
    assert abs(float(values.mean())) < 1e-3
    # The head's outputs, blanks and repeats in: a a <pad> a | b.
    assert processor.batch_decode([[5, 5, 0, 5, 4, 6, 0]]) == ["aa b"]
    assert processor(text="a b").input_ids == [5, 4, 6]


def test_the_image_processor_crops_as_evaluation_does(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    out = tmp_path / "hf"
    assert export(tuned("v1_vision", TaskConfig(classes=3), tmp_path), out) == 0
    processor = AutoImageProcessor.from_pretrained(out)
    image = Image.new("RGB", (60, 40), (255, 0, 0))
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_a_fine_tuned_model_is_not_written_in_the_references_names(tmp_path: Path) -> None:
    assert export(tuned("v1_vision", TaskConfig(classes=3), tmp_path), tmp_path / "out", "--to", "fairseq") == 2
