"""Encoders as ONNX graphs: ONNX Runtime computes what torch does, for batches and lengths of any size."""

import importlib.util
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, tool, tuned

import d2v_scale
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.interop import onnx_export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
warnings.filterwarnings("ignore")


def program_of(folder: Path) -> str:
    [program] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(program)


CTC = TaskConfig(kind="ctc", ctc=CtcConfig(letters="abc"))


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def export(*arguments: object) -> int:
    code: int = tool("export").main([*map(str, arguments), "--to", "onnx"])
    return code


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(program_of(out), {})
    return capsys.readouterr().out.strip()


def test_a_graph_gives_what_embed_gives_and_its_card_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime
    from transformers import AutoFeatureExtractor

    run, out = checkpoint_of("v2_maps", tmp_path), tmp_path / "onnx"
    assert export(run, out, "--license", "mit") == 0
    said = capsys.readouterr().out
    assert "model.onnx, opset 18: values, attention_mask to last_hidden_state" in said
    assert {file.name for file in out.iterdir()} == {
        *("README.md", "config.json", "model.onnx", "preprocessor_config.json"),
        "feature_extraction_data2vec2_array.py",
    }
    assert not list(tmp_path.glob(".onnx-*"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    processor = AutoFeatureExtractor.from_pretrained(out, trust_remote_code=True)
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(2, 8, length)) for length in (80, 13, 40, 1)]
    given = processor(arrays, return_tensors="np")
    [states] = session.run(None, {name: given[name] for name in ("values", "attention_mask")})
    real = given["attention_mask"][..., None]
    pooled = (states[:, 2:] * real).sum(1) / real.sum(1)
    assert np.allclose(pooled, d2v_scale.load_encoder(run, device="cpu").embed(arrays).numpy(), atol=1e-4)
    card = (out / "README.md").read_text()
    assert "library_name: onnx" in card
    assert len(program_of(out).splitlines()) <= 12
    assert run_card(out, monkeypatch, capsys).endswith("(1, 82, 32)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "more", "printed"),
    [
        *[(name, None, (), "32)") for name in (*tiny_models.NAMES, "v1_series", "v2_cubes")],
        ("v2_speech", None, ("--half", "--opset", "20"), "32)"),
        ("v2_speech", CTC, (), "8)"),
        ("v1_series", TaskConfig(classes=3), (), "(1, 3)"),
    ],
)
def test_every_kind_has_a_graph_whose_card_runs(
    name: str,
    task: TaskConfig | None,
    more: tuple[str, ...],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = checkpoint_of(name, tmp_path) if task is None else tuned(name, task, tmp_path), tmp_path / "onnx"
    assert export(run, out, *more) == 0
    assert run_card(out, monkeypatch, capsys).endswith(printed)


@pytest.mark.slow
def test_half_and_large_weights_have_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    monkeypatch.setattr(onnx_export, "_FILE_BYTES", 1000)
    run, out = checkpoint_of("v2_maps", tmp_path), tmp_path / "onnx"
    assert export(run, out, "--half") == 0
    assert {"model.onnx", "model.onnx.data"} <= {file.name for file in out.iterdir()}
    kinds = {
        tensor.data_type for tensor in onnx.load(out / "model.onnx").graph.initializer if np.prod(tensor.dims) > 128
    }
    assert onnx.TensorProto.FLOAT not in kinds
    parameters = sum(p.numel() for p in d2v_scale.load_encoder(run, device="cpu")._frozen.model.parameters())
    assert (out / "model.onnx.data").stat().st_size < 3 * parameters
    assert "float16" in (out / "README.md").read_text()
    assert run_card(out, monkeypatch, capsys).endswith("(1, 82, 32)")


@pytest.mark.slow
def test_a_wrong_exported_weight_is_noticed_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from d2v_scale.interop import exporting

    write = exporting.write_tensors

    def spoil(tensors: Any, out: Path) -> None:
        write(((n, 1.1 * t if n == "blocks.1.ffn.fc2.weight" else t) for n, t in tensors), out)

    monkeypatch.setattr(exporting, "write_tensors", spoil)
    assert export(checkpoint_of("v2_maps", tmp_path), tmp_path / "out") == 2
    assert "The exported model differs from ours" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a)
    )
    assert export(checkpoint_of("v2_maps", tmp_path), tmp_path / "out") == 2
    assert "--to onnx needs onnxruntime. Run `pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Exotic(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        x = self.inner(x, *rest)
        return x + torch.linalg.eigh(torch.eye(3) * x.sum())[0].sum()


def test_an_operator_that_an_opset_lacks_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = checkpoint_of("v2_maps", tmp_path), tmp_path / "onnx"
    assert export(run, out, "--opset", "16") == 2
    assert "Opset 16 has no form of LayerNormalization, " in capsys.readouterr().err
    assert export(run, out, "--opset", "999") == 2
    assert "no opset 999" in capsys.readouterr().err
    load = onnx_export._loaded

    def exotic(*arguments: Any) -> Any:
        called, *rest = load(*arguments)
        called.model.context = Exotic(called.model.context)
        return called, *rest

    monkeypatch.setattr(onnx_export, "_loaded", exotic)
    assert export(run, out) == 2
    assert "aten._linalg_eigh" in capsys.readouterr().err
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_folder_of_weights_is_left_alone_and_a_later_export_has_its_own_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = checkpoint_of("v2_maps", tmp_path), tmp_path / "hf"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"")
    assert tool("export").main([str(run), str(out)]) == 0
    assert "onnx" not in (out / "README.md").read_text()
    held = sorted(path.name for path in out.iterdir())
    assert export(run, out) == 2
    assert "holds weights of another export" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == held


def test_options_that_a_format_has_not_are_refused(tmp_path: Path) -> None:
    for more in (["--to", "hf", "--opset", "18"], ["--to", "onnx", "--log_model", "x"]):
        with pytest.raises(SystemExit):
            tool("export").main([str(tmp_path), str(tmp_path / "out"), *more])


@pytest.mark.parametrize(
    ("name", "to"),
    [
        *[(name, "hf") for name in ("v1_vision", "v2_maps")],
        ("v2_text", "safetensors"),
        *[(name, "fairseq") for name in ("v1_speech", "v2_vision", "v1_vision")],
    ],
)
def test_half_stores_float16_and_differs_little(
    name: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpoint_of(name, tmp_path)
    sizes = []
    for more in ([], ["--half"]):
        out = tmp_path / f"out{len(more)}"
        assert tool("export").main([str(run), str(out), "--to", to, *more]) == 0
        files = [*out.glob("model*.safetensors"), *out.glob("checkpoint.pt*")]
        sizes.append(sum(file.stat().st_size for file in files))
    assert sizes[1] < 0.62 * sizes[0]
    assert "PASS" in capsys.readouterr().out
    if to != "fairseq":
        assert "stored in float16" in (out / "README.md").read_text()
        assert run_card(out, monkeypatch, capsys)
    if to == "hf":
        assert json.loads((out / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("to", ["hf", "safetensors", "fairseq", "onnx"])
def test_a_value_beyond_float16_is_refused_by_its_tensor(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from d2v_scale.checkpoint.reader import Checkpoint

    read = Checkpoint.tensor

    def large(self: Checkpoint, kind: str, name: str) -> torch.Tensor:
        return read(self, kind, name) * (1e6 if name == "blocks.1.ffn.fc1.weight" else 1)

    monkeypatch.setattr(Checkpoint, "tensor", large)
    run, out = checkpoint_of("v2_vision", tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--to", to, "--half"]) == 2
    said = capsys.readouterr().err
    assert ("blocks.1.mlp.fc1.weight holds" if to == "fairseq" else "blocks.1.ffn.fc1.weight holds") in said
    assert "65504" in said
    assert not out.exists()
