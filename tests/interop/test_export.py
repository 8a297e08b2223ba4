"""Export and import through the tools, on small models with random weights of all six kinds."""

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from d2v_scale.checkpoint import open_any, write_single
from d2v_scale.data import tokenizer
from d2v_scale.data2vec.config import LossConfig, ObjectiveConfig
from d2v_scale.interop.encoder_source import open_encoder, recipe_of
from d2v_scale.interop.importing import convert, open_source
from d2v_scale.model.stack import Student
from d2v_scale.recipe import Recipe, to_dict

TOOLS = Path(__file__).parents[2] / "tools"
warnings.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint_of(name: str, tmp_path: Path) -> Path:
    """A checkpoint whose student and teacher have different random weights."""
    torch.manual_seed(0)
    model = tiny_models.model(name)
    objective = ObjectiveConfig(target=tiny_models.target_of(name))
    if name == "v1_vision":
        objective.loss = LossConfig(beta=2.0, reduction="mean_channels")
    recipe = Recipe(name=name, model=model, objective=objective)
    parts = recipe.parts()
    shapes = {n: p.shape for n, p in Student(model).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + (n.endswith("norm1.weight")) for n, shape in shapes.items()}
    teacher = {n: t + 0.1 * torch.randn_like(t) for n, t in student.items() if parts.role(n) == "averaged"}
    teacher |= {n: t for n, t in student.items() if parts.role(n) == "copied"}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe)))}
    write_single(tmp_path / "run" / "checkpoints", student, teacher, extra)
    return tmp_path / "run"


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_an_exported_folder_computes_what_our_teacher_computes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Acceptance check 2: the tool loads the folder with AutoModel and compares; it ends with 1 above 1e-4."""
    run, out = checkpoint_of(name, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out), "--to", "hf"]) == 0
    printed = capsys.readouterr().out
    assert "PASS" in printed
    shared = {"v1_speech": "stems.speech.features", "v2_speech": "stems.speech.features", "v2_text": "stems.text"}
    if name in shared:
        assert shared[name] in printed
    assert (out / "modeling_data2vec2.py").exists() == (name in ("v2_speech", "v2_vision"))
    if not name.endswith("text"):
        assert (out / "preprocessor_config.json").exists()


def test_a_wrong_exported_weight_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v_scale.interop import exporting

    write = exporting.write_tensors

    def spoil(tensors, out: Path) -> None:  # type: ignore[no-untyped-def]
        write(((n, t + 1e-2 if n == "encoder.layer.1.output.dense.bias" else t) for n, t in tensors), out)

    monkeypatch.setattr(exporting, "write_tensors", spoil)
    assert tool("export").main([str(checkpoint_of("v1_vision", tmp_path)), str(tmp_path / "hf")]) == 1


@pytest.mark.parametrize("name", ["v2_speech", "v2_vision"])
def test_a_2_0_folder_does_not_load_into_a_class_of_another_architecture(name: str, tmp_path: Path) -> None:
    from transformers import AutoModel, BeitModel, Data2VecAudioModel, Data2VecVisionModel, ViTModel

    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of(name, tmp_path)), str(out)]) == 0
    for wrong in (Data2VecAudioModel, Data2VecVisionModel, ViTModel, BeitModel):
        with pytest.raises((ValueError, TypeError, RuntimeError, ArithmeticError)):
            wrong.from_pretrained(out)
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        AutoModel.from_pretrained(out, trust_remote_code=False)


def test_a_2_0_folder_survives_saving_and_loading_again(tmp_path: Path) -> None:
    from transformers import AutoModel

    out, again = tmp_path / "hf", tmp_path / "again"
    assert tool("export").main([str(checkpoint_of("v2_vision", tmp_path)), str(out)]) == 0
    model = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    model.save_pretrained(again)
    image = torch.randn(1, 3, 16, 16)
    loaded = AutoModel.from_pretrained(again, trust_remote_code=True).eval()
    assert torch.equal(model(image).last_hidden_state, loaded(image).last_hidden_state)
    assert model.config.hidden_size == 32


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


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_import_of_an_export_to_fairseq_is_the_identity(name: str, tmp_path: Path) -> None:
    run, out = checkpoint_of(name, tmp_path), tmp_path / "reference"
    assert tool("export").main([str(run), str(out), "--to", "fairseq"]) == 0
    (file,) = out.iterdir()
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


def _sizes(model) -> dict:  # type: ignore[no-untyped-def]
    values = dataclasses.asdict(model)
    if not model.visible_only:
        # Decoder sizes mean nothing for a 1.0 model.
        values["predictor"] = values["predictor"]["kind"]
    return values


def test_safetensors_export_holds_every_tensor_under_our_names(tmp_path: Path) -> None:
    run, out = checkpoint_of("v1_speech", tmp_path), tmp_path / "plain"
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0
    tensors, checkpoint = load_file(out / "model.safetensors"), open_any(run)
    assert set(tensors) == set(checkpoint.names("student"))
    name = "blocks.0.ffn.fc1.weight"
    assert torch.equal(tensors[name], checkpoint.tensor("teacher", name))
    assert not torch.equal(tensors[name], checkpoint.tensor("student", name))
    assert json.loads((out / "d2v_scale.json").read_text())["recipe"]["name"] == "v1_speech"


def test_a_tokenizer_of_another_size_is_refused_before_weights_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "tokenizer.model", tmp_path / "hf"
    tokenizer.train(["some words to count, and some more of them"] * 20, model, vocab_size=290)
    run = checkpoint_of("v1_text", tmp_path)
    assert tool("export").main([str(run), str(out), "--tokenizer", str(model)]) == 2
    assert "<mask>" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


def test_large_weights_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v_scale.interop import exporting

    monkeypatch.setattr(exporting, "FILE_BYTES", 20_000)
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_text", tmp_path)), str(out)]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("part-*"))


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
    file = out / "checkpoint.pt"
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
    file = out / "checkpoint.pt"
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


def test_a_padded_text_is_served_as_the_text_alone(tmp_path: Path) -> None:
    from d2v_scale.interop.mlflow_encoder import ExportedModel
    from d2v_scale.interop.mlflow_model import model_settings

    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_text", tmp_path)), str(out)]) == 0
    model = ExportedModel()
    settings = model_settings("text", None)
    model.load_context(argparse.Namespace(model_config=settings, artifacts={"encoder": str(out)}))
    ids = torch.randint(5, 38, (1, 8))
    padded = torch.cat([ids, torch.full((1, 5), model.model.config.pad_token_id)], dim=1)
    assert np.allclose(model.predict(None, padded.numpy()), model.predict(None, ids.numpy()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2_vision", "v1_text"])
def test_a_model_logged_to_mlflow_is_served_by_its_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow models predict --env-manager local` gives what the exported folder gives; the run knows the model."""
    from mlflow import MlflowClient
    from transformers import AutoModel

    from d2v_scale.tracking import RunTracker, TrackingConfig
    from d2v_scale.tracking.follow import catch_up
    from d2v_scale.tracking.mirror_state import MirrorState

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run, out = checkpoint_of(name, tmp_path), tmp_path / "hf"
    tracker = RunTracker(run, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(1, 1, {"loss": 1.0})
    tracker.finish("done")
    catch_up(run)
    assert tool("export").main([str(run), str(out), "--log_model", str(run)]) == 0

    client = MlflowClient(uri)
    found = client.get_run(MirrorState.load(run).run_id)
    assert found.info.status == "FINISHED"
    (logged,) = client.search_logged_models([found.info.experiment_id])
    assert logged.source_run_id == found.info.run_id

    values = torch.randn(2, 3, 16, 16) if name == "v2_vision" else torch.randint(5, 38, (2, 12))
    (tmp_path / "input.json").write_text(json.dumps({"inputs": values.tolist()}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local", "-t", "json"]
    command += [
        "-m",
        f"models:/{logged.model_id}",
        "-i",
        str(tmp_path / "input.json"),
        "-o",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = torch.tensor(json.loads((tmp_path / "out.json").read_text())["predictions"])
    with torch.no_grad():
        states_btd = AutoModel.from_pretrained(out, trust_remote_code=True).eval()(values).last_hidden_state
    expected = (states_btd[:, 1:] if name == "v2_vision" else states_btd).mean(dim=1)
    assert torch.allclose(answer, expected, atol=1e-5)
