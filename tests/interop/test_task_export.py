"""Fine-tuned models through the tool: the exported class gives our logits, and its processor reads and writes."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import tuned

from d2v_scale.commands import export as export_command
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.evaluation import answers
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.interop.mlflow_model import model_settings, signature
from d2v_scale.model.config import ModelConfig
from d2v_scale.networks.draw import Draw
from d2v_scale.shards.writing import write_set

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
    return export_command.main([str(argument) for argument in arguments])


def test_the_teacher_of_a_fine_tuned_model_is_refused_as_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, task = CASES[0]
    assert export(tuned(name, task, tmp_path), tmp_path / "hf", "--weights", "teacher") == 2
    assert "A fine-tuned model has no teacher" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


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


@pytest.mark.parametrize("evaluation_crop", [0.8, 1.0])
@pytest.mark.parametrize("size", [(240, 80), (80, 160)])
@pytest.mark.parametrize("name", ["v1_vision", "v2_vision_wide"])
def test_the_image_processor_crops_a_long_image_as_evaluation_does(
    name: str, size: tuple[int, int], evaluation_crop: float, tmp_path: Path
) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    out = tmp_path / "hf"
    run = tuned(name, TaskConfig(classes=3), tmp_path, evaluation_crop)
    assert export(run, out) == 0
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 9), np.sin(y / 9), np.sin((x + y) / 13)]
    pixels = np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    write_set(tmp_path, "test", "image", [{"__key__": "a", "png": content, "cls": 0}], per_shard=2)
    recipe = TaskPredictor.load(run).recipe
    [(batch, _)] = LabelledSet(str(tmp_path), "vision", recipe.data, recipe.model)
    # transformers' own stretches images to a shape that is no square.
    processor = AutoImageProcessor.from_pretrained(out, trust_remote_code=name in tiny_models.WIDE)
    theirs = processor(Image.open(tmp_path / "image.png"), return_tensors="pt").pixel_values
    assert theirs.shape == batch.inputs.shape
    # Squashed or cut elsewhere, the waves would be off by their whole height of two.
    assert (theirs - batch.inputs).abs().max() < 0.25
    # An image that is stored lying on its side is seen upright, and a grey one in three channels.
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = AutoImageProcessor.from_pretrained(out, trust_remote_code=True)
    turned = upright(Image.open(tmp_path / "turned.png"), return_tensors="pt").pixel_values
    assert torch.equal(turned, theirs)
    assert processor(Image.new("L", size), return_tensors="pt").pixel_values.shape == theirs.shape


@pytest.mark.parametrize(("name", "task"), [("v2_vision", TaskConfig(classes=3)), ("v2_speech", CTC)])
def test_the_encoder_of_a_fine_tuned_2_0_export_loads_without_its_head(
    name: str, task: TaskConfig, tmp_path: Path
) -> None:
    from transformers import AutoModel

    run, out = tuned(name, task, tmp_path), tmp_path / "hf"
    assert export(run, out) == 0
    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    ours = TaskPredictor.load(run)
    batch = tiny_models.batch(name)
    with torch.no_grad():
        theirs_btd = model(**{model.main_input_name: batch.inputs}).last_hidden_state
        ours_btd = ours.model.states(replace(batch, valid=None), Draw(0, 0))
    assert torch.allclose(theirs_btd[:, theirs_btd.shape[1] - ours_btd.shape[1] :], ours_btd, atol=1e-5)


def served(
    folder: Path, config: ModelConfig, modality: str, task: TaskConfig | None, values: torch.Tensor
) -> np.ndarray:
    """What MLflow answers of a folder."""
    from d2v_scale.interop.mlflow_encoder import ExportedModel

    model = ExportedModel()
    settings = model_settings(config, modality, task)
    model.load_context(argparse.Namespace(model_config=settings, artifacts={"encoder": str(folder)}))
    return model.predict(None, values.numpy())


@pytest.mark.parametrize(
    ("name", "modality", "task"),
    [
        ("v2_vision", "vision", TaskConfig(classes=3)),
        ("v1_text", "text", TaskConfig(kind="regress")),
        ("v2_speech", "speech", CTC),
    ],
)
def test_a_fine_tuned_model_is_served_with_its_head(name: str, modality: str, task: TaskConfig, tmp_path: Path) -> None:
    run, out = tuned(name, task, tmp_path), tmp_path / "hf"
    assert export(run, out) == 0
    batch = replace(tiny_models.batch(name), valid=None)
    predictor = TaskPredictor.load(run)
    answer = served(out, predictor.recipe.model, modality, task, batch.inputs)
    if task.kind == "ctc":
        logits = predictor.logits(batch)
        texts = answers(task, logits, torch.full((len(logits), 1), -1), torch.full((len(logits),), logits.shape[1]))
        assert answer.tolist() == [text for text, _ in texts]
    else:
        assert np.allclose(answer, predictor.logits(tiny_models.batch(name)).numpy(), atol=1e-5)
    outputs = signature(predictor.recipe.model, modality, task).outputs
    assert outputs is not None
    [given] = outputs.inputs
    assert given.shape[1:] == answer.shape[1:]


def test_a_fine_tuned_model_is_not_written_in_the_references_names(tmp_path: Path) -> None:
    assert export(tuned("v1_vision", TaskConfig(classes=3), tmp_path), tmp_path / "out", "--to", "fairseq") == 2
