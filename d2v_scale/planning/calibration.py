"""Costs that were measured on this machine: the file they are kept in, which is read only where it was made.

Measured by `benchmarks/calibrate.py`; figures of one machine, of one PyTorch or of one DeepSpeed are not another's.
"""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from d2v_scale.errors import ConfigError
from d2v_scale.files import write_whole
from d2v_scale.planning.costs import Costs, Host, Rate, Ring
from d2v_scale.planning.hardware import Hardware

FORMAT = 1
_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Costs, with where and when they were measured."""

    machine: dict[str, str]
    """`machine()` of there."""
    date: str
    ranks: int
    """So many devices of a node computed at once."""
    costs: Costs


def machine() -> dict[str, str]:
    """What must be alike for costs to be: processor, cores, device, and the versions of what was measured."""
    found = {"processor": _processor(), "cores": str(os.cpu_count())}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return found | {name: version(name) for name in ("torch", "deepspeed", "d2v_scale")}


def this_device(ranks: int, alike: Hardware) -> Hardware:
    """This machine's device, of which `ranks` share the host's memory; otherwise as `alike`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    if not torch.cuda.is_available():
        return dataclasses.replace(alike, name="cpu", memory_bytes=memory, host_bytes=memory)
    device = torch.cuda.get_device_properties(0)
    return dataclasses.replace(alike, name=device.name, memory_bytes=float(device.total_memory), host_bytes=memory)


def write(path: Path, calibration: Calibration) -> None:
    """Keep it as JSON."""
    write_whole(path, json.dumps({"format": FORMAT, **dataclasses.asdict(calibration)}, indent=1) + "\n")


def read(path: Path, here: dict[str, str] | None = None) -> Calibration:
    """A calibration of this machine (`here`: of this one). Raises ConfigError for a file that is none, of another
    format, or of another machine or version, which is named."""
    again = "Measure here with --calibrate."
    try:
        held = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError("calibration", f"there is no file {path}", again) from None
    except (OSError, ValueError) as error:
        raise ConfigError("calibration", f"{path} cannot be read: {error}", again) from None
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        said = held.get("format") if isinstance(held, dict) else None
        raise ConfigError("calibration", f"{path} is of format {said}, not {FORMAT}", again)
    try:
        found = _from_json(held)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError("calibration", f"{path} is damaged: {error}", again) from None
    here = here or machine()
    there = {key: found.machine.get(key) for key in here}
    other = [f"{key}: {there[key]}, here {here[key]}" for key in here if there[key] != here[key]]
    if other:
        raise ConfigError("calibration", f"{path} was measured elsewhere ({'; '.join(other)})", again)
    return found


def _from_json(held: dict[str, Any]) -> Calibration:
    parts = dict(held["costs"])
    kinds: dict[str, Any] = {"blocks": Rate, "others": Rate, "zero_1": Host, "zero_3": Host, "ring": Ring}
    for name, kind in kinds.items():
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in parts[name].items()}
        parts[name] = kind(**values)
    for number in _numbers(held["costs"]):
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{number} is no cost")
    return Calibration(
        machine=dict(held["machine"]), date=str(held["date"]), ranks=int(held["ranks"]), costs=Costs(**parts)
    )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield float(value)


def _processor() -> str:
    if _CPU_INFO.exists():
        names = [line.partition(":")[2] for line in _CPU_INFO.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()
