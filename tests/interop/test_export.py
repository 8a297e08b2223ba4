"""Export through the tool, of small models with random weights of all six kinds."""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, tool
from safetensors.torch import load_file

from d2v_scale.checkpoint import open_any
from d2v_scale.modalities.text import tokenizer_training

warnings.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


@pytest.mark.parametrize("name", [*tiny_models.NAMES, "v2_vision_wide"])
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
    assert (out / "modeling_data2vec2.py").exists() == (name in ("v2_speech", "v2_vision", "v2_vision_wide"))
    if not name.endswith("text"):
        assert (out / "preprocessor_config.json").exists()


@pytest.mark.parametrize(("name", "to"), [("v2_vision_wide", "fairseq"), ("v1_vision_wide", "hf")])
def test_images_that_are_no_squares_are_refused_where_the_format_has_none(
    name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers' class takes the table of relative positions for one of width x height."""
    out = tmp_path / "out"
    assert tool("export").main([str(checkpoint_of(name, tmp_path)), str(out), "--to", to]) == 2
    said = capsys.readouterr().err
    assert "16 x 24 pixels" in said
    assert "model.vision.image_size" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "to"),
    [("v1_vision+0", "fairseq"), ("v1_speech+1", "fairseq"), ("v1_text+1", "hf"), ("v2_vision+2", "hf")],
)
def test_extra_tokens_that_a_format_has_not_are_refused_by_name(
    name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert tool("export").main([str(checkpoint_of(name, tmp_path)), str(out), "--to", to]) == 2
    said = capsys.readouterr().err
    assert f"has {name[-1]} (model.{tiny_models.modality_of(name)}.extra_tokens)" in " ".join(said.split())
    assert not out.exists()


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
    tokenizer_training.train(["some words to count, and some more of them"] * 20, model, vocab_size=290)
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


def test_a_padded_text_is_served_as_the_text_alone(tmp_path: Path) -> None:
    from d2v_scale.interop.mlflow_encoder import ExportedModel
    from d2v_scale.interop.mlflow_model import model_settings

    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_text", tmp_path)), str(out)]) == 0
    model = ExportedModel()
    settings = model_settings(tiny_models.model("v1_text"), "text", None)
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


@pytest.mark.parametrize(
    "options",
    [
        "--to fairseq --weights student",
        "--to fairseq --tokenizer spm.model",
        "--to safetensors --modality vision",
        "--to safetensors --tokenizer spm.model",
        "--to safetensors --log_model run",
        "--to hf --tokenizer spm.model",
    ],
)
def test_an_option_that_the_export_would_not_heed_is_refused(options: str, tmp_path: Path) -> None:
    run, out = checkpoint_of("v1_vision", tmp_path), tmp_path / "out"
    arguments = [str(run), str(out), *options.split()]
    if "hf" in options:
        assert tool("export").main(arguments) == 2
    else:
        with pytest.raises(SystemExit) as caught:
            tool("export").main(arguments)
        assert caught.value.code == 2
    assert not out.exists()
