"""Import through the tool: of our own exports, of what others wrote, of what is damaged or harmful."""

import argparse
import collections
import dataclasses
import json
import os
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, tool
from safetensors.torch import load_file, save_file

from d2v_scale.checkpoint import open_any
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.encoder_source import open_encoder, recipe_of
from d2v_scale.interop.importing import convert, open_source
from d2v_scale.interop.reference_vision import input_size
from d2v_scale.model.stem_config import VisionStem

warnings.filterwarnings("ignore")
TOKENS = ("v2_vision+0", "v2_vision+2", "v2_speech+2", "v2_text+1")


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


@pytest.mark.parametrize("name", ["v1_speech", "v1_text", "v1_vision", "v2_text"])
def test_import_of_a_hugging_face_export_gives_the_same_encoder(name: str, tmp_path: Path) -> None:
    run, out = checkpoint_of(name, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out), "--weights", "student"]) == 0
    imported = convert(open_source(out), "again")
    checkpoint = open_any(run)
    prenetless = {n for n in checkpoint.names("student") if not n.startswith("predictors.")}
    assert prenetless <= imported.student.keys()
    for tensor_name in prenetless:
        assert torch.equal(imported.student[tensor_name], checkpoint.tensor("student", tensor_name))
    assert any("initialised anew" in line for line in imported.lines)


def test_foreign_weights_bring_the_normalisation_of_their_inputs(tmp_path: Path) -> None:
    speech, vision, fairseq = tmp_path / "speech", tmp_path / "vision", tmp_path / "fairseq"
    run = str(checkpoint_of("v1_speech", tmp_path / "a"))
    assert tool("export").main([run, str(speech)]) == 0
    assert tool("export").main([run, str(fairseq), "--to", "fairseq"]) == 0
    assert tool("export").main([str(checkpoint_of("v1_vision", tmp_path / "b")), str(vision)]) == 0
    for folder, values in ((speech, {"do_normalize": False}), (vision, {"image_mean": [0.5] * 3})):
        (folder / "d2v_scale.json").unlink()
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    content = torch.load(fairseq / "checkpoint.pt", weights_only=True)
    content["cfg"]["task"] = {"normalize": False}
    torch.save(content, fairseq / "checkpoint.pt")
    assert open_encoder(speech).recipe.data.speech.normalize is False
    assert open_encoder(vision).recipe.data.vision.mean == [0.5] * 3
    assert convert(open_source(speech), "again").recipe.data.speech.normalize is False
    assert convert(open_source(fairseq / "checkpoint.pt"), "again").recipe.data.speech.normalize is False


@pytest.mark.parametrize("name", [*tiny_models.NAMES, "v1_vision_wide", *TOKENS])
def test_import_of_an_export_to_fairseq_is_the_identity(name: str, tmp_path: Path) -> None:
    run, out = checkpoint_of(name, tmp_path), tmp_path / "reference"
    assert tool("export").main([str(run), str(out), "--to", "fairseq"]) == 0
    (file,) = (path for path in out.iterdir() if path.suffix in (".pt", ".pth"))
    assert tool("import_weights").main([str(file), str(tmp_path / "back")]) == 0
    before, after = open_any(run), open_any(tmp_path / "back")
    for kind in ("student", "teacher"):
        assert set(before.names(kind)) == set(after.names(kind))
        for tensor_name in before.names(kind):
            assert torch.equal(before.tensor(kind, tensor_name), after.tensor(kind, tensor_name))
    mine, theirs = recipe_of(before), recipe_of(after)
    assert _sizes(theirs.model) == _sizes(mine.model)
    assert theirs.objective.target == mine.objective.target
    assert theirs.objective.loss == mine.objective.loss
    assert dataclasses.replace(theirs.objective.ema, index="completed") == mine.objective.ema
    assert theirs.parts() == mine.parts()


@pytest.mark.parametrize(
    ("given", "rows", "size"),
    [
        (16, 7 * 7 + 3, 16),
        ([16, 24], 7 * 11 + 3, (16, 24)),
        ((24, 16), 7 * 11 + 3, (24, 16)),
        (224, 7 * 7 + 3, 16),  # what the table says counts
        ([16, 24], None, (16, 24)),
    ],
)
def test_a_table_of_relative_positions_decides_the_size_of_images(
    given: object, rows: int | None, size: object
) -> None:
    table = None if rows is None else (rows, 4)
    assert VisionStem(image_size=input_size(given, 4, table), patch_size=4).image_size == size


@pytest.mark.parametrize(("given", "rows"), [(16, 7 * 11 + 3), ([16, 20], 7 * 11 + 3), ("large", 52), ([1, 2, 3], 52)])
def test_a_table_that_fits_no_images_is_refused(given: object, rows: int) -> None:
    with pytest.raises(CheckpointError, match=r"relative positions|of size"):
        input_size(given, 4, (rows, 4))


def test_a_hugging_face_folder_of_wide_images_is_refused_since_its_class_computes_another_bias(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_vision", tmp_path)), str(out)]) == 0
    settings = json.loads((out / "config.json").read_text()) | {"image_size": [4, 100]}  # a table of as many rows
    (out / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="exchanges height"):
        open_source(out)


def _sizes(model) -> dict:  # type: ignore[no-untyped-def]
    values = dataclasses.asdict(model)
    if not model.visible_only:
        # Decoder sizes mean nothing for a 1.0 model.
        values["predictor"] = values["predictor"]["kind"]
    return values


class Harmful:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_wants_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, trace, out = tmp_path / "model.pt", tmp_path / "it ran", tmp_path / "out"
    torch.save({"model": {}, "cfg": Harmful(trace)}, file)
    assert tool("import_weights").main([str(file), str(out)]) == 2
    assert "mkdir" in capsys.readouterr().err
    file.write_bytes(pickle.dumps({"model": {}, "cfg": Harmful(trace)}))
    assert tool("import_weights").main([str(file), str(out)]) == 2
    assert not trace.exists()
    assert not out.exists()


def damaged(kind: str, tmp_path: Path) -> Path:
    out = tmp_path / "reference"
    assert tool("export").main([str(checkpoint_of("v2_text", tmp_path)), str(out), "--to", "fairseq"]) == 0
    (file,) = (path for path in out.iterdir() if path.suffix in (".pt", ".pth"))
    content = torch.load(file, weights_only=True)
    if kind == "missing":
        del content["model"]["blocks.1.attn.qkv.weight"]
    elif kind == "renamed":
        content["model"]["blocks.1.attn.qkw.weight"] = content["model"].pop("blocks.1.attn.qkv.weight")
    elif kind == "shape":
        content["model"]["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    elif kind == "unknown":
        content["model"] = {"layer1.0.conv1.weight": torch.zeros(1)}
    elif kind == "teacher":
        content["model"]["_ema"].pop("1.mlp.fc1.bias")
    elif kind == "config":
        content["cfg"] = None
    torch.save(content, file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    return file


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "missing: blocks.1.attn.qkv.weight"),
        ("renamed", "unexpected: blocks.1.attn.qkw.weight"),
        ("shape", "blocks.1.mlp.fc1.bias (3,)"),
        ("unknown", "layer1.0.conv1.weight"),
        ("teacher", "missing: blocks.1.mlp.fc1.bias"),
        ("config", "no model configuration"),
        ("truncated", "cannot be loaded"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_its_keys_and_nothing_is_written(
    kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert tool("import_weights").main([str(damaged(kind, tmp_path)), str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_a_truncated_hugging_face_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_vision", tmp_path)), str(out)]) == 0
    weights = out / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert tool("import_weights").main([str(out), str(tmp_path / "back")]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    tensors["encoder.layer.0.lambda_3"] = torch.zeros(1)
    save_file(tensors, weights)
    assert tool("import_weights").main([str(out), str(tmp_path / "back")]) == 2
    assert "unexpected: encoder.layer.0.lambda_3" in capsys.readouterr().err


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """A class that pickles as `module.name`, of a package that is not installed."""
    made = type(name, (), {"__module__": module, "__qualname__": name})
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    setattr(sys.modules[module], name, made)
    return made


def wrapped(value: object, node: type, tree: type) -> object:
    """As omegaconf keeps it: every dictionary and every leaf an object with its content in its state."""
    if isinstance(value, dict):
        made = tree()
        made.__dict__.update(_metadata=None, _content={k: wrapped(v, node, tree) for k, v in value.items()})
        return made
    made = node()
    made.__dict__.update(_metadata=None, _val=value)
    return made


def test_a_fairseq_checkpoint_with_configuration_objects_is_read_without_importing_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "reference"
    assert tool("export").main([str(checkpoint_of("v1_speech", tmp_path)), str(out), "--to", "fairseq"]) == 0
    (file,) = (path for path in out.iterdir() if path.suffix in (".pt", ".pth"))
    content = torch.load(file, weights_only=True)
    node = stand_in(monkeypatch, "omegaconf.nodes", "AnyNode")
    tree = stand_in(monkeypatch, "omegaconf.dictconfig", "DictConfig")
    words = stand_in(monkeypatch, "fairseq.data.dictionary", "Dictionary")
    content["cfg"] = wrapped(content["cfg"], node, tree)
    content["task_state"] = {"dictionary": words()}
    content["extra_state"] = {"best": np.float64(1.5), "meter": collections.defaultdict(int)}
    torch.save(content, file)
    monkeypatch.undo()
    assert open_source(file).reference.model.backbone.heads == 4


def test_an_older_fairseq_checkpoint_has_its_settings_in_args(tmp_path: Path) -> None:
    out = tmp_path / "reference"
    assert tool("export").main([str(checkpoint_of("v1_speech", tmp_path)), str(out), "--to", "fairseq"]) == 0
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    content["args"] = argparse.Namespace(**content.pop("cfg")["model"])
    torch.save(content, out / "checkpoint.pt")
    assert open_source(out / "checkpoint.pt").reference.model.backbone.heads == 4
