"""Tables of kinds, one a library: a kind without a row is refused by name, and one stem of several is exported."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, tool
from safetensors.torch import load_file

from d2v_scale import modalities
from d2v_scale.checkpoint import open_any, write_single
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop import huggingface, reference_table
from d2v_scale.interop.encoder_source import open_encoder, recipe_of
from d2v_scale.interop.importing import convert, open_source
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.stem_config import OwnPredictor
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict

Captured = pytest.CaptureFixture[str]
PARTS = ("stems", "predictors")


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def joint(tmp_path: Path, *, final_norm_of_decoder: bool = False, **backbone: object) -> Path:
    """A run of three stems, of which one has another prenet and another predictor than the rest."""
    torch.manual_seed(0)
    vision, speech, text = tiny_models.vision("sincos"), tiny_models.speech(alibi=True), tiny_models.text()
    vision.prenet_depth = 2
    vision.predictor = OwnPredictor(kind="conv2d", width=16, kernel=3, final_norm=final_norm_of_decoder)
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
    published = set(modalities.KINDS) - {"array"}
    assert {row.kind for row in huggingface.TABLE} == set(modalities.KINDS)
    assert {row.kind for row in reference_table.TABLE} == published
    for row in huggingface.TABLE:
        assert set(row.heads) == set(modalities.class_of(row.kind).tasks)


@pytest.mark.parametrize(("to", "table"), [("hf", huggingface), ("fairseq", reference_table)])
@pytest.mark.parametrize("name", ["v1_vision", "v2_text"])
def test_a_kind_without_a_row_is_refused_by_name_before_anything_is_written(
    name: str, to: str, table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    kind = tiny_models.modality_of(name)
    monkeypatch.setattr(table, "TABLE", tuple(row for row in table.TABLE if row.kind != kind))
    run, out = checkpoint_of(name, tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--to", to]) == 2
    said = capsys.readouterr().err
    assert f"{kind}, a stem of the kind {kind}" in said
    assert "--to safetensors" in said
    assert not out.exists()


def test_a_kind_without_any_row_is_written_and_read_under_our_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (huggingface, reference_table):
        monkeypatch.setattr(table, "TABLE", tuple(row for row in table.TABLE if row.kind != "vision"))
    run, out = checkpoint_of("v1_vision", tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0
    written = load_file(out / "model.safetensors")
    assert set(written) == set(open_any(run).names("student"))
    name = "stems.vision.features.patch.weight"
    assert torch.equal(torch.as_tensor(open_encoder(out).read(name)), written[name])


def test_a_model_that_no_class_computes_is_refused_by_its_keys_before_anything_is_written(
    tmp_path: Path, capsys: Captured
) -> None:
    """The norm behind the last block was left out without a word, and blocks of the wrong kind were written."""
    run, out = joint(tmp_path, norm_first=True, final_norm=True), tmp_path / "out"
    for modality in ("vision", "speech", "text"):
        if modality != "text":  # which the modelling file of several parts computes
            assert tool("export").main([str(run), str(out), "--modality", modality]) == 2
            said = capsys.readouterr().err
            assert modality in said
            assert "--to safetensors" in said
            assert "model.backbone.norm_first, model.backbone.final_norm" in said
        assert tool("export").main([str(run), str(out), "--modality", modality, "--to", "fairseq"]) == 2
        assert "fairseq's 2.0 models are post-norm with a key bias; this one is not" in capsys.readouterr().err
        assert not out.exists()
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0


def test_what_the_reference_has_no_name_for_is_named_and_nothing_is_written(tmp_path: Path, capsys: Captured) -> None:
    """The norm of a decoder was left out without a word."""
    run, out = joint(tmp_path, final_norm_of_decoder=True), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--modality", "vision", "--to", "fairseq"]) == 2
    assert "the reference has no name for predictors.vision.norm.weight" in capsys.readouterr().err
    assert not out.exists()


def test_a_stem_that_is_not_there_is_named(tmp_path: Path, capsys: Captured) -> None:
    run = checkpoint_of("v1_text", tmp_path)
    assert tool("export").main([str(run), str(tmp_path / "out"), "--modality", "ecg"]) == 2
    assert "has stems for text" in capsys.readouterr().err


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_one_stem_of_several_is_exported_with_its_own_prenet(modality: str, tmp_path: Path, capsys: Captured) -> None:
    """The prenet of all was taken for each, and an exported folder was read back as the first stem's."""
    run, out = joint(tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--modality", modality]) == 0
    assert "PASS" in capsys.readouterr().out
    encoder = FrozenEncoder.load(out)
    assert encoder.recipe.model.modalities == [modality]
    batch = tiny_models.batch(f"v2_{modality}")
    ours = FrozenEncoder.load(run).hidden_states(batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, encoder.hidden_states(batch), strict=True))


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_one_stem_of_several_in_the_references_names_is_imported_as_itself(modality: str, tmp_path: Path) -> None:
    """A joint model's images were said to be without an averaged patch embedding, and could not be imported."""
    run, out = joint(tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--modality", modality, "--to", "fairseq"]) == 0
    imported = convert(open_source(out / "checkpoint.pt"), "again")
    checkpoint = open_any(run)
    recipe = recipe_of(checkpoint)
    for kind, tensors in (("student", imported.student), ("teacher", imported.teacher)):
        others = tuple(f"{part}.{name}." for name in {"vision", "speech", "text"} - {modality} for part in PARTS)
        assert set(tensors) == {name for name in checkpoint.names(kind) if not name.startswith(others)}
        assert all(torch.equal(tensor, checkpoint.tensor(kind, name)) for name, tensor in tensors.items())
    assert imported.recipe.model == recipe.model.of(modality)
    assert imported.recipe.objective.masking.prob == recipe.objective.of(modality).masking.prob
