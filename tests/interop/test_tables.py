"""Tables of kinds, one a library: a kind without a row is refused by name, and one stem of several is exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, tool
from safetensors.torch import load_file

from d2v_scale import modalities
from d2v_scale.checkpoint import open_any, write_single
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop import huggingface
from d2v_scale.interop.encoder_source import open_encoder
from d2v_scale.model.config import Backbone, ModelConfig, OwnPredictor
from d2v_scale.model.stack import Student
from d2v_scale.recipe import Recipe, to_dict


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def joint(tmp_path: Path, **backbone: object) -> Path:
    """A run of three stems, of which one has another prenet and another predictor than the rest."""
    torch.manual_seed(0)
    vision, speech, text = tiny_models.vision("sincos"), tiny_models.speech(alibi=True), tiny_models.text()
    vision.prenet_depth = 2
    vision.predictor = OwnPredictor(kind="conv2d", width=16, kernel=3)
    text.prenet_depth = 0
    model = ModelConfig(
        visible_only=True,
        vision=vision,
        speech=speech,
        text=text,
        backbone=Backbone(**{**tiny_models.POST, "prenet_depth": 1, **backbone}),  # type: ignore[arg-type]
        predictor=tiny_models.decoder("conv1d"),
    )
    recipe = Recipe(name="joint", model=model)
    recipe.objective.target = replace(tiny_models.TAPS)
    parts = recipe.parts()
    shapes = {n: p.shape for n, p in Student(model).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + n.endswith("norm1.weight") for n, shape in shapes.items()}
    teacher = {n: t + 0.1 * torch.randn_like(t) for n, t in student.items() if parts.role(n) == "averaged"}
    write_single(
        tmp_path / "run" / "checkpoints", student, teacher, {"recipe": json.loads(json.dumps(to_dict(recipe)))}
    )
    return tmp_path / "run"


def test_every_kind_has_a_row_with_classes_for_its_tasks() -> None:
    assert {row.kind for row in huggingface.TABLE} == set(modalities.KINDS)
    for row in huggingface.TABLE:
        assert set(row.heads) == set(modalities.class_of(row.kind).tasks)


def test_a_kind_that_transformers_has_no_row_for_is_refused_by_name_and_written_under_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface, "TABLE", tuple(row for row in huggingface.TABLE if row.kind != "vision"))
    run, out = checkpoint_of("v1_vision", tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out)]) == 2
    said = capsys.readouterr().err
    assert "transformers has no class for vision" in said
    assert "--to safetensors" in said
    assert not out.exists()
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0
    written = load_file(out / "model.safetensors")
    assert set(written) == set(open_any(run).names("student"))
    name = "stems.vision.features.patch.weight"
    assert torch.equal(torch.as_tensor(open_encoder(out).read(name)), written[name])


def test_a_model_that_no_class_computes_is_refused_by_its_keys_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The norm behind the last block was left out without a word, and blocks of the wrong kind were written."""
    run, out = joint(tmp_path, norm_first=True, final_norm=True), tmp_path / "out"
    for modality in ("vision", "speech", "text"):
        assert tool("export").main([str(run), str(out), "--modality", modality]) == 2
        said = capsys.readouterr().err
        assert modality in said
        assert "--to safetensors" in said
        assert modality == "text" or "model.backbone.norm_first, model.backbone.final_norm" in said
        assert not out.exists()
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0


def test_a_stem_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint_of("v1_text", tmp_path)
    assert tool("export").main([str(run), str(tmp_path / "out"), "--modality", "ecg"]) == 2
    assert "has stems for text" in capsys.readouterr().err


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_one_stem_of_several_is_exported_with_its_own_prenet(
    modality: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prenet of all was taken for each, and an exported folder was read back as the first stem's."""
    run, out = joint(tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--modality", modality]) == 0
    assert "PASS" in capsys.readouterr().out
    encoder = FrozenEncoder.load(out)
    assert encoder.recipe.model.modalities == [modality]
    batch = tiny_models.batch(f"v2_{modality}")
    ours = FrozenEncoder.load(run).hidden_states(batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, encoder.hidden_states(batch), strict=True))
