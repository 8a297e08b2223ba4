"""What was measured on a machine is kept, and read there only."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from plan_jobs import FREE

from d2v_scale.errors import ConfigError
from d2v_scale.planning import calibration
from d2v_scale.planning.calibration import Calibration
from d2v_scale.planning.costs import Rate

HERE = {"processor": "Zen", "cores": "64", "device": "H100", "torch": "2.13.0"}


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Calibration]:
    costs = dataclasses.replace(FREE, blocks=Rate(widths=(64, 256), flops=(1e9, 4e9)))
    made = Calibration(machine=HERE, date="2026-11-30T12:00:00+00:00", ranks=8, costs=costs)
    calibration.write(tmp_path / "kept.json", made)
    return tmp_path / "kept.json", made


def test_what_was_kept_is_read(kept: tuple[Path, Calibration]) -> None:
    path, made = kept
    assert calibration.read(path, HERE) == made


@pytest.mark.parametrize(("key", "other"), [("processor", "Xeon"), ("device", "A100"), ("torch", "2.14.0")])
def test_another_machine_or_version_is_said_by_name(kept: tuple[Path, Calibration], key: str, other: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: {HERE[key]}, here {other}.*--calibrate") as error:
        calibration.read(kept[0], {**HERE, key: other})
    assert error.value.key == "calibration"


def test_this_machine_is_not_the_one_of_the_file(kept: tuple[Path, Calibration]) -> None:
    with pytest.raises(ConfigError, match="measured elsewhere"):
        calibration.read(kept[0])
    assert set(calibration.machine()) >= {"processor", "cores", "device", "torch", "deepspeed", "d2v_scale"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 0}, "of format 0, not 1"),
        ({"costs": {}}, "is damaged"),
        ({"machine": None}, "is damaged"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(
    kept: tuple[Path, Calibration], changed: dict[str, Any], said: str
) -> None:
    path, _ = kept
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(ConfigError, match=said):
        calibration.read(path, HERE)


def test_a_file_of_impossible_costs_is_refused(kept: tuple[Path, Calibration]) -> None:
    path, _ = kept
    held = json.loads(path.read_text())
    held["costs"]["link"] = -1.0
    path.write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="is damaged"):
        calibration.read(path, HERE)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        calibration.read(path, HERE)
    with pytest.raises(ConfigError, match="there is no file"):
        calibration.read(path.with_name("none.json"), HERE)
