"""What a run computes in is measured at its start and kept from then on."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.model import cpu_ops, cpu_speed
from d2v_scale.process import started
from d2v_scale.running import arithmetic
from d2v_scale.tracking.record import METRICS_FILE

RAW: dict[str, Any] = {"zero_optimization": {"stage": 1}}
WORLD: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What measurements say, to be changed."""
    said: dict[str, Any] = {"gain": 1.0, "by_blas": [], "native": True, "processor": "here"}
    monkeypatch.delenv(started.MEASURE, raising=False)
    monkeypatch.setattr(cpu_speed, "gain_of_bf16", lambda backbone, length, biased: said["gain"])
    monkeypatch.setattr(cpu_speed, "faster_by_blas", lambda: said["by_blas"])
    monkeypatch.setattr(cpu_speed, "has_native_bf16", lambda: said["native"])
    monkeypatch.setattr(arithmetic.calibration, "machine", lambda: {"processor": said["processor"], "device": "gpu"})
    monkeypatch.setattr(cpu_ops, "_by_blas", frozenset())
    return said


def settled(directory: Path, *arguments: str, raw: dict[str, Any] = RAW) -> tuple[str, list[str]]:
    """The precision, and the classes of products by the BLAS."""
    recipe, _ = command_line.parse([*arguments])
    config = arithmetic.settle(recipe, raw, directory, WORLD)
    assert json.loads((directory / "ds_config.json").read_text()) == config
    return "bf16" if config["bf16"]["enabled"] else "fp32", sorted(cpu_ops._by_blas)


def begin_training(directory: Path) -> None:
    with (directory / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 1, "time": 0.0, "loss": 1.0}) + "\n")


def test_what_is_clearly_faster_is_taken(tmp_path: Path, measured: dict[str, Any]) -> None:
    measured["by_blas"] = ["small both"]
    assert settled(tmp_path) == ("fp32", ["small both"])
    kept = arithmetic.read(tmp_path)
    assert kept is not None
    assert kept.why == "fp32, bf16 at 1.00 of its speed; BLAS for 1 of 12 kinds of products"
    measured["gain"] = 1.5
    # No step was taken: nothing is to be kept. Products in bf16 are not those that were measured.
    assert settled(tmp_path) == ("bf16", [])
    assert settled(tmp_path, "--precision=fp32") == ("fp32", ["small both"])
    measured["native"] = False
    assert settled(tmp_path) == ("fp32", ["small both"])
    assert settled(tmp_path, "--precision=bf16") == ("bf16", [])


def test_a_json_that_says_fp32_is_not_contradicted(tmp_path: Path, measured: dict[str, Any]) -> None:
    measured["gain"] = 1.5
    assert settled(tmp_path, raw={**RAW, "bf16": {"enabled": False}})[0] == "fp32"


@pytest.mark.parametrize("gain", [0.5, 1.5])
def test_a_resumed_run_keeps_what_it_began_with(
    gain: float, tmp_path: Path, measured: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    measured |= {"gain": gain, "by_blas": ["small both", "large neither"]}
    first = settled(tmp_path)
    begin_training(tmp_path)
    measured |= {"gain": 2.0 - gain, "by_blas": ["middle second"]}
    assert settled(tmp_path) == first
    assert "measured on" not in caplog.text
    measured |= {"processor": "there", "native": False}
    assert settled(tmp_path) == first
    assert "measured on here, not on this there" in caplog.text
    assert ("no bf16 of its own" in caplog.text) is (gain > 1)
    # The file is as it was: the third machine says the same.
    assert arithmetic.read(tmp_path) == arithmetic.read(tmp_path)
    assert json.loads((tmp_path / arithmetic.FILE).read_text())["processor"] == "here"


def test_a_precision_that_is_chosen_later_is_not_said_to_be_measured(tmp_path: Path, measured: dict[str, Any]) -> None:
    """The header said "bf16, at 1.50 of fp32's speed" of a run in fp32."""
    assert arithmetic.told(tmp_path, "fp32") == ""
    measured["gain"] = 1.5
    settled(tmp_path)
    begin_training(tmp_path)
    assert settled(tmp_path, "--precision=fp32")[0] == "fp32"
    assert arithmetic.told(tmp_path, "bf16") == "bf16, at 1.50 of fp32's speed"
    assert arithmetic.told(tmp_path, "fp32") == ""


def test_a_run_of_an_earlier_version_goes_on_as_it_did(tmp_path: Path, measured: dict[str, Any]) -> None:
    measured |= {"gain": 1.5, "by_blas": ["small both"]}
    begin_training(tmp_path)
    assert settled(tmp_path) == ("fp32", [])


def test_where_nothing_is_measured_every_start_has_the_same_bits(
    tmp_path: Path, measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"gain": 1.5, "by_blas": ["small both"]}
    monkeypatch.setenv(started.MEASURE, "0")
    assert settled(tmp_path) == ("fp32", [])


def test_a_file_that_cannot_be_read_stops_a_run_that_has_trained(tmp_path: Path) -> None:
    settled(tmp_path)
    begin_training(tmp_path)
    (tmp_path / arithmetic.FILE).write_text('{"precision": "fp')
    with pytest.raises(ConfigError, match=r"arithmetic\.json, which says what the run computes in"):
        settled(tmp_path)
