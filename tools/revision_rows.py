"""What differs between two mappings of a revision's values, said in a line; and the table of such lines."""

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN = 6
_MEASURED = re.compile(r"^(time|hours|host_|gpu_|device_|data_wait|pipeline_idle)|seconds|per_second|tflops|mfu|memory")
"""Metrics of the machine, not of the run: no two runs have them in common."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    kind: str
    name: str
    result: str
    """`equal`, `added: ...`, `DIFFERS: ...`, or `not compared: ...`."""

    @property
    def differs(self) -> bool:
        """Whether something is gone, or has another value."""
        return self.result.startswith("DIFFERS")


def result_of(removed: Iterable[str], changed: Iterable[str], added: Iterable[str]) -> str:
    """The verdict in words; additions alone are no difference."""
    parts = [
        f"{word} {_some(list(values))}"
        for word, values in (("without", list(removed)), ("", list(changed)), ("with", list(added)))
        if values
    ]
    text = "; ".join(part.strip() for part in parts)
    if not parts:
        return "equal"
    return f"added: {text.removeprefix('with ')}" if not list(removed) and not list(changed) else f"DIFFERS: {text}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], show_values: bool = True) -> str:
    """The verdict on two flat mappings, by key. Floats are equal if all their bits are, or if both are NaN."""
    changed = [
        f"{key} ({_short(old[key])} -> {_short(new[key])})" if show_values else key
        for key in old
        if key in new and not _same(old[key], new[key])
    ]
    return result_of([key for key in old if key not in new], changed, [key for key in new if key not in old])


def compare_names(old: Iterable[str], new: Iterable[str]) -> str:
    """The verdict on two sets of names."""
    return compare(dict.fromkeys(sorted(old), 0), dict.fromkeys(sorted(new), 0))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping of dotted keys; what is empty is a value."""
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def metrics(run_dir: Path, after: int = -1) -> dict[str, dict[int, float]]:
    """Every series of `metrics.jsonl` behind step `after`, value by step, but for what the machine decides."""
    series: dict[str, dict[int, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and record["step"] > after and not _MEASURED.search(name):
                series.setdefault(name, {})[record["step"]] = value
    return series


def compare_series(old: dict[str, dict[int, float]], new: dict[str, dict[int, float]]) -> str:
    """The verdict on two records: where a series differs, its first step that does."""
    changed = []
    for name in old.keys() & new.keys():
        steps = [s for s in sorted(old[name].keys() | new[name].keys()) if not _same_at(old[name], new[name], s)]
        if steps:
            before, now = (_short(one.get(steps[0], "nothing")) for one in (old[name], new[name]))
            changed.append(f"{name} from step {steps[0]} ({before} -> {now})")
    # The loss first: it is what everybody looks for.
    return result_of(sorted(old.keys() - new.keys()), sorted(changed, key=_loss_first), sorted(new.keys() - old.keys()))


def tar_members(path: Path) -> dict[str, str]:
    """Digest by member name."""
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member)) for member in archive if member.isfile()]
        return {name: _digest(file.read()) for name, file in files if file is not None}


def safetensors(path: Path) -> dict[str, str]:
    """Digest of type, shape and bytes by tensor name."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: _digest(
            f"{entry['dtype']} {entry['shape']}".encode(),
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def contents(folder: Path) -> dict[str, Any]:
    """What files hold, by file and key: tensors, members of tars, values of JSON; of others, that they exist."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        values: Mapping[str, Any] = {"": "exists"}
        if path.suffix == ".safetensors":
            values = safetensors(path)
        elif path.suffix == ".tar":
            values = tar_members(path)
        elif path.suffix == ".json":
            values = flat(json.loads(path.read_text()))
        found |= {f"{name}: {key}" if key else name: value for key, value in values.items()}
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of a Markdown table; comparisons of one kind and result share a line."""
    yield "| comparison | of | result |"
    yield "|---|---|---|"
    kinds = list(dict.fromkeys(row.kind for row in rows))
    for kind in kinds:
        of_kind = [row for row in rows if row.kind == kind]
        for result in dict.fromkeys(row.result for row in of_kind):
            names = [row.name for row in of_kind if row.result == result]
            shown = ", ".join(names) if len(names) <= _SHOWN else f"{len(names)} of {len(of_kind)}"
            yield f"| {kind} | {shown} | {result.replace('|', '/')} |"


def _some(values: list[str]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(values[:_SHOWN]) + more


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old):
        return math.isnan(new)
    return type(old) is type(new) and repr(old) == repr(new)


def _same_at(old: dict[int, float], new: dict[int, float], step: int) -> bool:
    return step in old and step in new and _same(old[step], new[step])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _loss_first(text: str) -> tuple[bool, str]:
    return not text.startswith("loss "), text


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
