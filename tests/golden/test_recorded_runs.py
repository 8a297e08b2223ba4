"""Recorded reference runs, replayed. A reduced set is part of the repository; the full one is used where it lies."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2v_scale.interop.golden import Fixture, Replay
from d2v_scale.interop.golden_check import _worst_norm, check, uncompared

REDUCED = Path(__file__).parent / "recorded"
ROOT = Path(__file__).parents[2]
FULL = ROOT.parent / "shared" / "golden"
NAMES = ("v1_audio", "v1_text", "v1_vision_beit", "v2_audio", "v2_image", "v2_text")
TOOL = ROOT / "tools" / "check_golden.py"


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def failures(folder: Path) -> list[str]:
    return [quantity.line() for quantity in check(folder) if quantity.passed is False]


@pytest.mark.parametrize("name", NAMES)
def test_every_quantity_of_the_reduced_recording_is_reproduced(name: str) -> None:
    quantities = list(check(REDUCED / name))
    assert [q.line() for q in quantities if q.passed is False] == []
    assert uncompared(quantities) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_quantity_of_the_full_recording_is_reproduced(name: str) -> None:
    if not (FULL / name).is_dir():
        pytest.skip("the full recordings are not beside this repository")
    quantities = list(check(FULL / name))
    assert [q.line() for q in quantities if q.passed is False] == []
    # What decides parity must have been there.
    compared = {q.name for q in quantities if q.passed}
    assert {"targets", "predictions", "loss", "final student", "final teacher"} <= compared


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(REDUCED / name, tmp_path / name))


def change_meta(folder: Path, *path: str, value: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    owner = meta
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("name", "path", "value", "noticed_in"),
    [
        ("v1_audio", ("config", "instance_norm_target_layer"), False, "targets"),
        ("v1_audio", ("config", "average_top_k_layers"), 2, "targets"),
        ("v1_audio", ("config", "ema_end_decay"), 0.98, "EMA decay"),
        ("v1_audio", ("optimizer", "eps"), 1e-4, "torch_adamw step 1 loss"),
        ("v1_text", ("config", "loss_beta"), 2, "loss"),
        ("v1_vision_beit", ("loop_config", "norm_eps"), 1e-3, "predictions"),
        ("v2_audio", ("config", "num_heads"), 2, "predictions"),
        ("v2_image", ("config", "cls_loss"), 0.02, "loss"),
    ],
)
def test_a_recipe_that_differs_from_the_recording_fails(
    name: str, path: tuple[str, ...], value: object, noticed_in: str, tmp_path: Path
) -> None:
    folder = copy_of(name, tmp_path)
    change_meta(folder, *path, value=value)
    if path[-1] == "num_heads":
        change_meta(folder, "config", "modalities", "audio", "use_alibi_encoder", value=False)
        tensors = load_file(folder / "student_init.safetensors")
        del tensors["modality_encoders.AUDIO.alibi_scale"]
        save_file(tensors, folder / "student_init.safetensors")
        tensors = load_file(folder / "teacher_init.safetensors")
        del tensors["modality_encoders.AUDIO.alibi_scale"]
        save_file(tensors, folder / "teacher_init.safetensors")
    assert any(line.split("  ")[0].strip().endswith(noticed_in) for line in failures(folder))


def with_another_block(folder: Path) -> None:
    """The recorded model, and after its last block one that changes nothing: its layer scales are 0. What was tapped
    still is, and is no longer the last; only the norm of the whole gradient is another, by that of the new scales."""
    change_meta(folder, "config", "depth", value=5)
    for name in ("student_init", "teacher_init"):
        tensors = load_file(folder / f"{name}.safetensors")
        new = {k.replace("blocks.3.", "blocks.4."): t.clone() for k, t in tensors.items() if k.startswith("blocks.3.")}
        new |= {k: torch.zeros_like(t) for k, t in new.items() if ".gamma_" in k}
        save_file({**tensors, **new}, folder / f"{name}.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta["steps_torch_adamw"] = meta["steps_torch_adamw"][:1]
    del meta["steps_torch_adamw"][0]["grad_norm_total"]
    del meta["steps_torch_adamw"][0]["ema_decay_after"]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("layers", [[1, 2, 3], "[3, 1, 2]", [-4, -3, -2]])
def test_targets_of_any_layers_are_the_references(layers: list[int] | str, tmp_path: Path) -> None:
    """1.0 vision's `target_layers: [1, 2, 3]` of 5."""
    folder = copy_of("v1_vision_beit", tmp_path)
    with_another_block(folder)
    change_meta(folder, "loop_config", "target_layers", value=layers)
    assert load_tool().main([str(folder)]) == 0
    assert Fixture(folder).reference.objective.target.layers == [1, 2, 3]


@pytest.mark.parametrize(("layers", "said"), [([0, 2, 3], "FAIL"), ([1, 5], "not blocks of 5"), ([1, 1], "twice")])
def test_other_layers_are_not_taken_for_the_recorded_ones(
    layers: list[int], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("v1_vision_beit", tmp_path)
    with_another_block(folder)
    change_meta(folder, "loop_config", "target_layers", value=layers)
    assert load_tool().main([str(folder)]) in (1, 2)
    out, err = capsys.readouterr()
    assert said in out + err


def test_clones_share_one_teacher_forward_and_have_equal_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance check 8."""
    replay = Replay(Fixture(REDUCED / "v2_image"))
    rows = []
    block = replay.teacher.blocks[0]
    block.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    targets_btd = replay.targets(torch.empty(0))
    assert rows == [replay.batch.inputs.shape[0]]
    clones = replay.batch.masked_rt.shape[0] // rows[0]
    expanded = targets_btd.repeat_interleave(clones, dim=0)
    assert torch.equal(expanded[0], expanded[clones - 1])


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_golden", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool_prints_a_line_per_quantity_and_ends_with_0() -> None:
    command = [sys.executable, str(TOOL), str(REDUCED / "v1_vision_beit")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("targets ") and line.endswith("PASS") for line in lines)
    assert any(line.startswith("final student") and line.endswith("absent") for line in lines)


def test_the_tool_ends_with_1_when_a_quantity_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of("v1_vision_beit", tmp_path)
    change_meta(folder, "loop_config", "l1_beta", value=1.0)
    assert load_tool().main([str(folder)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_recording_of_other_names_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of("v1_vision_beit", tmp_path)
    tensors = load_file(folder / "io.safetensors")
    renamed = {"target.y": "targets", "pred.x": "predictions"}
    save_file({renamed.get(key, key): tensor for key, tensor in tensors.items()}, folder / "io.safetensors")
    assert load_tool().main([str(folder)]) == 1
    assert "FAIL: the recording does not hold what decides parity: targets, predictions" in capsys.readouterr().out


def test_a_recorded_norm_of_a_tensor_that_is_not_here_fails() -> None:
    tensors = {"norm.weight": torch.ones(4)}
    assert _worst_norm("norms", tensors, {"norm.weight": 2.0}).passed
    missing = _worst_norm("norms", tensors, {"norm.weight": 2.0, "norm.wait": 2.0})
    assert missing.passed is False
    assert "norm.wait" in missing.line()
    assert _worst_norm("norms", tensors, {}).passed is None


def rename_key(folder: Path) -> None:
    tensors = load_file(folder / "student_init.safetensors")
    tensors["blocks.0.norm1.wait"] = tensors.pop("blocks.0.norm1.weight")
    save_file(tensors, folder / "student_init.safetensors")


def reshape_key(folder: Path) -> None:
    tensors = load_file(folder / "student_init.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"][:-1].clone()
    save_file(tensors, folder / "student_init.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "io.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def of_nothing_known(folder: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, folder / "student_init.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rename_key, ["missing: blocks.0.norm1.weight", "unexpected: blocks.0.norm1.wait"]),
        (reshape_key, ["norm.weight (63,)"]),
        (truncate, ["io.safetensors cannot be read"]),
        (of_nothing_known, ["no data2vec architecture", "conv1.weight"]),
    ],
)
def test_bad_input_ends_with_2_and_names_the_keys(  # type: ignore[no-untyped-def]
    damage, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of("v1_vision_beit", tmp_path)
    damage(folder)
    assert load_tool().main([str(folder)]) == 2
    complaint = capsys.readouterr().err
    for text in said:
        assert text in complaint
