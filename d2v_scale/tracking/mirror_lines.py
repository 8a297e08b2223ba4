"""The run directory's files as the mirror reads them: whole lines from an offset, and MLflow's points from records."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2v_scale.tracking.mirror_names import shown_as


def mlflow_name(name: str) -> str:
    """A name MLflow accepts."""
    return re.sub(r"[^\w\-./: ]", "_", name).strip("/")[:250]


def points_of(record: dict[str, Any], already: dict[int, set[str]], stems: Mapping[str, str]) -> list[Any]:
    """MLflow's points of a record but for the names that it has at this step `already`. `stems`: see `shown_as`."""
    from mlflow.entities import Metric

    when = int(record["time"] * 1000)
    # The other axes ride on training records only: one point a step.
    left_out = {"step", "time", "mirrored", "certain", *(() if "loss" in record else ("samples", "hours"))}
    left_out |= already.get(record["step"], set())
    return [
        Metric(mlflow_name(shown), float(value), when, record["step"])
        for key, value in record.items()
        if key not in left_out and isinstance(value, int | float)
        for shown in shown_as(key, stems)
    ]


def events_in(data: bytes) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, event) of every complete line."""
    end = 0
    for line in data.splitlines(keepends=True):
        start, end = end, end + len(line)
        if not line.endswith(b"\n"):
            return
        try:
            event = json.loads(line)
        except ValueError:  # torn by a kill or a full disk: it must not stand in the way of all that follow
            continue
        yield start, end, event


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; what is none is passed over."""
    return [line for _, _, line in events_in(read_from(path, 0)) if isinstance(line, dict)]


def complete_bytes(data: bytes) -> int:
    """Bytes up to the end of the last whole line; what follows is being written, or was torn."""
    return data.rfind(b"\n") + 1


def size_of(path: Path) -> int:
    """Bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0


def read_from(path: Path, offset: int) -> bytes:
    """What follows `offset`; nothing where there is no file."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()
