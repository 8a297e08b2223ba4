"""Speed and memory of whole steps on one GPU: ViT-L and speech-large, 1.0 and 2.0, against the Hugging Face peer.

The rows and their rank: `device_rows.py`. Every row is measured in a process of its own with a time limit, so that one
that runs out of memory or breaks costs that row alone, and the table names it. Writes table.md, results.json,
operations.txt and a trace of each main row into the output folder. MFU: FLOPs of matrix products, convolutions and
attention (d2v_scale/planning/flops.py) over the device's published dense bf16 peak; `student` leaves out what the
teacher computes.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2v_scale.benchmarks import device_gradients
from d2v_scale.benchmarks.device_rows import Spec, specs

RESULTS = {"step_seconds", "gradients", "beside"}
"""Keys of a row that was measured: it has one of them."""
AGREE = 0.05
"""Largest relative difference of losses of the same weights and batch, bf16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py device`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--only",
        metavar="ROWS",
        help="names of rows or patterns, with commas between; `first`: the first eight minutes",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="rows that do not fit in are named, not measured")
    parser.add_argument(
        "--dry_run", action="store_true", help="tiny models, two steps, any device; all rows of the first"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print the table and write the folder; 1 if a row failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    wanted = specs(options.out, options.dry_run, options.only)
    rows = [
        {"model": one.model, "variant": one.variant, **row} for one, row in zip(wanted, _rows(wanted, end), strict=True)
    ]
    complete(rows)
    told = facts()
    operations = "\n".join(f"{row['model']}\n\n{row.pop('operations')}" for row in rows if "operations" in row)
    for spec in wanted:
        if spec.details is not None and Path(spec.details).exists():
            for trace in (Path(spec.details) / "logs").glob("*.json.gz"):
                trace.rename(options.out / f"trace-{spec.model.lower().replace(' ', '-')}.json.gz")
            shutil.rmtree(spec.details)
    told["specs"] = [asdict(spec) for spec in wanted]
    (options.out / "results.json").write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
    (options.out / "operations.txt").write_text(operations)
    text = table(rows, told)
    (options.out / "table.md").write_text(text)
    print(text)
    return 1 if any(RESULTS.isdisjoint(row) or row.get("gradients", {}).get("failed") for row in rows) else 0


def _rows(wanted: list[Spec], end: float) -> Iterator[dict[str, Any]]:
    """The row of every spec. The next process prepares itself while one measures, so that few seconds are lost."""
    with tempfile.TemporaryDirectory() as folder:
        waiting: Process | None = None
        for number, spec in enumerate(wanted):
            current = waiting or Process(spec, Path(folder), number)
            waiting = Process(wanted[number + 1], Path(folder), number + 1) if number + 1 < len(wanted) else None
            try:
                row = current.finish(end)
            except BaseException:
                if waiting is not None:
                    waiting.stop()
                raise
            print(f"{spec.model}, {spec.variant}: {_said(row)}", file=sys.stderr, flush=True)
            yield row


class Process:
    """A process that measures one row once it is told to."""

    def __init__(self, spec: Spec, folder: Path, number: int) -> None:
        self._limit_s = 200.0 if "compile" in spec.variant else 110.0
        self._row, self._log = folder / f"row{number}.json", folder / f"log{number}.txt"
        given = folder / f"spec{number}.json"
        given.write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", "d2v_scale.benchmarks.device_case", str(given), str(self._row)]
        paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )

    def finish(self, end: float) -> dict[str, Any]:
        """Let it measure until it is done or out of time; what it wrote, with a note where that is not all."""
        left = end - time.monotonic()
        if left < 5:
            self.stop()
            return {"note": "not measured: no time left"}
        limit_s = min(self._limit_s, left)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(b"go\n")
            self._process.stdin.close()
        try:
            code: int | None = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        row: dict[str, Any] = json.loads(self._row.read_text()) if self._row.exists() else {}
        if code != 0:
            lines = self._log.read_text().strip().splitlines()
            why = f"over {limit_s:.0f} s" if code is None else (lines[-1][:200] if lines else f"exit code {code}")
            row["note"] = f"{'incomplete' if row else 'not measured'}: {why}"
        return row

    def stop(self) -> None:
        """End it, its data workers included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def complete(rows: list[dict[str, Any]]) -> None:
    """Add to each row what follows from others: the ratio to the peer, the cost of an EMA in host memory, doubts."""
    of_variant = {(row["model"], row["variant"]): row for row in rows}
    for row in rows:
        if "step_seconds" not in row:
            continue
        plain = of_variant.get((row["model"], "ours"), {})
        peer = of_variant.get((row["model"], "hf"), {})
        if "step_seconds" in peer and row["variant"] not in OTHER_BATCHES:
            row["against_hf"] = row["samples_per_second"] / peer["samples_per_second"]
            if row["samples"] == peer["samples"] and abs(row["loss"] - peer["loss"]) > AGREE * abs(peer["loss"]):
                _note(row, f"loss {row['loss']:.4g}, the peer's {peer['loss']:.4g}")
        if row["variant"] == "teacher on cpu" and row["samples"] == plain.get("samples"):
            # It runs beside the rest: what counts is what the step loses by it.
            without = plain["step_seconds"] * (1 - plain["ema_share"])
            row["ema_share"] = max(0.0, 1 - without / row["step_seconds"])
        norm, usual = row.get("grad_norm"), plain.get("grad_norm")
        if norm is None or usual is None or row["samples"] != plain["samples"] or row["variant"] in OTHER_BATCHES:
            continue
        if abs(norm - usual) > 0.2 * usual:
            _note(row, f"gradient norm {norm:.4g} against {usual:.4g}")


def _note(row: dict[str, Any], text: str) -> None:
    row["note"] = "; ".join(filter(None, (row.get("note", ""), text)))


def facts() -> dict[str, Any]:
    """Device, versions, date and command."""
    import deepspeed
    import torch
    import transformers

    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(["bash", "tools/bench_gpu.sh", *sys.argv[2:]]),
    }


OTHER_BATCHES = ("varying lengths", "padded")
"""Variants whose batches are not those of `ours`."""
VERSIONS = ("torch", "deepspeed", "transformers", "cuda")
COLUMNS: dict[str, tuple[str, str]] = {
    # Title; key and format.
    "samples": ("samples", "d"),
    "step, ms": ("step_seconds", "ms"),
    "samples/s": ("samples_per_second", ".1f"),
    "against hf": ("against_hf", ".2f"),
    "MFU": ("total", "%"),
    "student": ("student_only", "%"),
    "peak GiB": ("peak_gib", ".1f"),
    "EMA": ("ema_share", "%"),
    "data wait": ("data_wait_share", "%"),
    "GFLOP a sample": ("gflops_per_sample", ".0f"),
}


def table(rows: list[dict[str, Any]], told: dict[str, Any]) -> str:
    """Markdown: one line of facts, the rows, and notes under them."""
    said = ", ".join(f"{key} {told[key]}" for key in VERSIONS if told[key])
    lines = [f"{told['device']}, {told['date']}, {said}; `{told['command']}`.", ""]
    lines += [f"| model | variant | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in rows:
        if not RESULTS.isdisjoint(row) and "step_seconds" not in row:
            continue
        cells = [_shown(row.get(key), how) for key, how in COLUMNS.values()]
        lines.append(f"| {row['model']} | {row['variant']} | {' | '.join(cells)} |")
    lines += ["", *(f"- {row['model']}, {row['variant']}: {row['note']}" for row in rows if row.get("note"))]
    lines += [f"- {row['model']}: {_beside(row)}" for row in rows if "beside" in row]
    lines += ["", *(device_gradients.table(row["gradients"]) for row in rows if "gradients" in row)]
    return "\n".join(lines).rstrip() + "\n"


def _beside(row: dict[str, Any]) -> str:
    return (
        f"the teacher's forward on a stream of its own beside the student's takes {row['beside']:.2f} of both in turn, "
        f"of which it is {100 * row['teacher_share']:.0f} %"
    )


def _shown(value: Any, how: str) -> str:
    if value is None:
        return ""
    if how == "ms":
        return f"{1000 * value:.1f}"
    return f"{100 * value:.1f} %" if how == "%" else f"{value:{how}}"


def _said(row: dict[str, Any]) -> str:
    speed = f"{row['samples_per_second']:.2f} samples/s" if "samples_per_second" in row else ""
    speed = _beside(row) if "beside" in row else speed
    if "gradients" in row:
        speed = f"{len(row['gradients']['calls'])} calls of attention compared"
    return "; ".join(filter(None, (speed, row.get("note", ""))))
