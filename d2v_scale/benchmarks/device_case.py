"""One row of the table of `bench.py device`, in a process of its own: `python -m ... SPEC.json ROW.json`.

It prepares what needs no device, waits for a line on stdin, measures, and writes the row, first after the timing and
again after what may still fail (reading data, the profile).
"""

import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.benchmarks import cases, device_gradients
from d2v_scale.benchmarks.cases import Case
from d2v_scale.benchmarks.device_rows import Spec
from d2v_scale.benchmarks.huggingface_peer import HuggingFacePeer
from d2v_scale.benchmarks.sides import Ours, Side
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import set_rates
from d2v_scale.parallel import groups
from d2v_scale.parallel.groups import Topology
from d2v_scale.planning import hardware
from d2v_scale.planning.flops import sample_cost
from d2v_scale.pretraining.step import Observations, train_step
from d2v_scale.pretraining.utilisation import lengths_of_batch
from d2v_scale.process.config import ProfileConfig
from d2v_scale.process.profiling import StepProfiler, decoders

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.33)
"""Of `Spec.length`: the lengths of varying batches; 3 to 20 s of 15."""


class _AutocastPeer(HuggingFacePeer):
    """fp32 weights, forward passes in bf16: what a script would do on a GPU."""

    def _loss(self, batch: Batch, noise_rtd: Tensor | None) -> Tensor:
        with torch.autocast(batch.inputs.device.type, dtype=torch.bfloat16):
            return super()._loss(batch, noise_rtd)


class Measured:
    """One side on this process's device."""

    def __init__(self, spec: Spec, samples: int, topology: Topology) -> None:
        self.spec, self.topology = spec, topology
        self.case = cases.case(spec.recipe, samples, spec.length, spec.options)
        self.side: Side
        if spec.peer:
            self.side = _AutocastPeer(self.case, topology.device)
        else:
            self.side = Ours(self.case, topology, "bf16")
        self.batches = [batch.to(topology.device) for batch in batches_of(self.case, spec)]
        self.grad_norm: float | None = None
        self._number = 0

    def step(self, batch: Batch | None = None) -> Observations | None:
        """One step; what ours leaves for the log."""
        self._number += 1
        batch = batch or self.batches[self._number % len(self.batches)]
        if not isinstance(self.side, Ours):
            self.side.step(batch, self._number)
            return None
        recipe, student = self.case.recipe, self.side.student
        set_rates(student.optimizer, recipe.optim, recipe.optim.warmup_steps)
        result, seen = train_step(
            student, self.side.teacher, [batch], recipe.objective, Draw(1, self._number), observe=False
        )
        if self.grad_norm is None:
            self.grad_norm = result.grad_norm
        return seen

    def loss(self) -> float:
        """Of the first batch before any step. Sides with the same weights, masks and noise agree."""
        batch = self.batches[0]
        rows, length = batch.masked_rt.shape
        torch.manual_seed(0)
        noise_rtd = torch.randn(rows, length, self.case.recipe.model.backbone.width, device=batch.inputs.device) * 0.01
        return self.side.loss(batch, noise_rtd)

    def blocks(self) -> tuple[list[float], float]:
        """Seconds of a step in each of three blocks, after the warm-up; seconds of the EMA in a step of the last."""
        # Whole rounds, so that every block has the same batches.
        rounds, count = max(1, self.spec.steps // len(self.batches)), len(self.batches)
        for _ in range(max(self.spec.warmup, count)):
            self.step()
        seconds, seen = [], []
        for _ in range(3):
            _wait()
            begin = time.perf_counter()
            seen = [self.step() for _ in range(rounds * count)]
            _wait()
            seconds.append((time.perf_counter() - begin) / (rounds * count))
        return seconds, statistics.mean(0.0 if one is None else one.ema_time.seconds() for one in seen)

    def describe(self, peak_flops: float | None) -> dict[str, Any]:
        """The row without what `details` adds."""
        row: dict[str, Any] = {"samples": self.case.samples, "loss": self.loss()}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seconds, ema = self.blocks()
        step = statistics.median(seconds)
        samples = statistics.mean(batch.inputs.shape[0] for batch in self.batches)
        total, student_only = self._flops()
        row |= {
            "step_seconds": step,
            "step_seconds_of_blocks": seconds,
            "samples_per_second": samples / step,
            "gflops_per_sample": total / samples / 1e9,
            "gflops_per_sample_student": student_only / samples / 1e9,
            "grad_norm": self.grad_norm,
        }
        if peak_flops is not None:
            row |= {"total": total / step / peak_flops, "student_only": student_only / step / peak_flops}
        if torch.cuda.is_available():
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 1024**3
        if not self.spec.peer:
            row["ema_share"] = ema / step
        return row

    def _flops(self) -> tuple[float, float]:
        """Of a step, the mean over the batches: all, and the student's alone. Padding counts as work."""
        recipe = self.case.recipe
        sums = [0.0, 0.0]
        for batch in self.batches:
            lengths = lengths_of_batch(batch, recipe.model.visible_only)
            cost = sample_cost(recipe.model, self.case.modality, lengths, recipe.parts(), recipe.built_targets())
            sums[0] += batch.inputs.shape[0] * cost.total
            sums[1] += batch.inputs.shape[0] * cost.student_only
        return sums[0] / len(self.batches), sums[1] / len(self.batches)

    def streams(self) -> dict[str, float]:
        """Time of the student's and the teacher's forward at once over both in turn, and the teacher's share of that.

        The teacher is given features that are there already: it waits for nothing but the weights."""
        assert isinstance(self.side, Ours)
        student, teacher, batch = self.side.student, self.side.teacher, self.batches[0]
        features_btd = student(batch, Draw(1, 1)).features_btd
        own = torch.cuda.Stream() if torch.cuda.is_available() else None

        def beside() -> None:
            if own is None:
                teacher(batch, features_btd)
            else:
                own.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(own):
                    teacher(batch, features_btd)
            student(batch, Draw(1, 1))
            if own is not None:
                torch.cuda.current_stream().wait_stream(own)

        def in_turn() -> None:
            student(batch, Draw(1, 1))
            teacher(batch, features_btd)

        ways = {"beside": beside, "in turn": in_turn, "teacher": lambda: teacher(batch, features_btd)}
        best = dict.fromkeys(ways, float("inf"))
        for number in range(self.spec.warmup + 3 * self.spec.steps):
            for name, way in ways.items():
                _wait()
                begin = time.perf_counter()
                way()
                _wait()
                if number >= self.spec.warmup:
                    best[name] = min(best[name], time.perf_counter() - begin)
        return {"beside": best["beside"] / best["in turn"], "teacher_share": best["teacher"] / best["in turn"]}

    def data_wait(self, folder: Path) -> float:
        """Share of the time that steps on decoded shards wait for the next batch."""
        from d2v_scale.benchmarks.samples import SAMPLES
        from d2v_scale.data.config import SourceConfig
        from d2v_scale.data.loader import StepLoader
        from d2v_scale.tracking.meters import SpeedMeter

        recipe = self.case.recipe
        sources = [SourceConfig(shards=str(folder / "train-*.tar"), modality=self.case.modality)]
        data = replace(recipe.data, sources=sources, workers=self.spec.workers)
        data = SAMPLES[self.case.modality].settings(data, self.spec.length)
        loader = StepLoader(
            data,
            recipe.model,
            recipe.masking(),
            recipe.objective.compat,
            seed=1,
            global_batch_size=self.case.samples,
            device=self.topology.device,
        )
        meter = SpeedMeter()
        for number in range(self.spec.warmup + 3 * self.spec.steps):
            if number == self.spec.warmup:
                _wait()
                meter.read()
            with meter.waiting("data"):
                batch = next(loader)[0]
            self.step(batch)
        _wait()
        share = meter.read()["data_wait_share"]
        loader.close()
        return share

    def profile(self, folder: Path) -> str:
        """Leave a trace of one step in `folder`; the table of its costliest operations."""
        assert isinstance(self.side, Ours)
        profiler = StepProfiler(ProfileConfig(steps="1:1"), folder, decoders(self.side.student.module))
        profiler.begin(1)
        self.step()
        table = profiler.end(1)
        assert table is not None
        return table.read_text()


def batches_of(case: Case, spec: Spec) -> list[Batch]:
    """What the steps take in turn, on the CPU."""
    if spec.lengths != "varying":
        return [case.batch(step, padded=spec.lengths == "padded") for step in range(2)]
    found = []
    for step, share in enumerate(SHARES):
        length = int(share * case.length)
        found.append(replace(case, samples=max(1, round(case.samples / share)), length=length).batch(step))
    return found


def measure(spec: Spec, row_file: Path) -> None:
    """Fill the row, at half the samples as often as the device's memory asks for."""
    with tempfile.TemporaryDirectory() as folder:
        shards, problem = Path(folder), ""
        if spec.details is not None:
            try:
                from d2v_scale.benchmarks.samples import SAMPLES

                case = cases.case(spec.recipe, spec.samples, spec.length, spec.options)
                kind = SAMPLES[case.modality]
                shards = kind.write(shards, max(4 * spec.samples, 32), kind.per_shard_of_device, spec.length)
            except ImportError as error:
                problem = f"data wait not measured: {error}"
        if not sys.stdin.readline():
            return  # the program that asked for the row is gone
        topology = groups.single_process()
        if spec.kind == "gradients":
            found = device_gradients.measure(topology.device)
            note = "; ".join(f"{call}: not the math kernel's gradients" for call in found["failed"])
            row_file.write_text(json.dumps({"gradients": found, "note": note}))
            groups.shutdown()
            return
        peak = hardware.bf16_peak(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        samples = spec.samples
        while True:
            try:
                measured = Measured(spec, samples, topology)
                row = dict[str, Any](measured.streams()) if spec.kind == "streams" else measured.describe(peak)
                break
            except torch.OutOfMemoryError:
                if samples == 1:
                    raise
                samples //= 2
            measured = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()
        row_file.write_text(json.dumps(row))
        if spec.details is not None:
            row["operations"] = measured.profile(Path(spec.details))
            row_file.write_text(json.dumps(row))
            if not problem:
                row["data_wait_share"] = measured.data_wait(shards)
            row["note"] = problem
            row_file.write_text(json.dumps(row))
        measured.side.close()
        groups.shutdown()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    measure(Spec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
