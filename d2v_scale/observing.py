"""All that is measured of a step that is logged, put together: what `train` records and judges."""

import torch
from torch import Tensor

from d2v_scale.breakdown import LossBreakdown
from d2v_scale.data.batch import Batch
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.totals import RunTotals
from d2v_scale.data2vec import ema
from d2v_scale.diagnostics import StepDiagnostics
from d2v_scale.health import HealthMonitor
from d2v_scale.parallel.pipeline import PipelineStudent
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.recipe import Recipe
from d2v_scale.step import Observations, collapse_statistics
from d2v_scale.teacher import EmaTeacher
from d2v_scale.tracking import SpeedMeter, host_values
from d2v_scale.utilisation import FlopMeter


class RunObserver:
    """Call `before` and `after` around every step, and `figures` after those that are logged."""

    def __init__(self, recipe: Recipe, student: StudentEngine, teacher: EmaTeacher, loader: StepLoader) -> None:
        self._recipe, self._student, self._teacher, self._loader = recipe, student, teacher, loader
        self._topology = student.topology
        self._diagnostics = StepDiagnostics(student, recipe.model.backbone.depth)
        self._flops = FlopMeter(recipe.model, recipe.parts(), self._topology, recipe.tracking.peak_tflops)
        self._totals = RunTotals(loader.sources)
        self._monitor = HealthMonitor(recipe.objective.health)
        self._recorded_samples = 0
        self._steps = 0
        self.records = 0
        """Logged steps of this process."""
        self.meter = SpeedMeter()
        self._ema_waited = 0.0
        self.breakdown: LossBreakdown | None = None
        """Where the step in progress puts its loss by source; None: it is not logged."""

    def start(self, samples: int) -> None:
        """Training begins or goes on here, after `samples`."""
        self.meter = SpeedMeter()
        self._recorded_samples, self._steps = samples, 0

    def before(self, micro_batches: list[Batch], logged: bool) -> None:
        """Get ready for a step. Local."""
        self._flops.count(micro_batches)
        self.breakdown = None
        if logged:
            self.breakdown = LossBreakdown(self._recipe.data.source_names(), self._topology.device)
            self._diagnostics.arm()

    def after(self) -> None:
        """A step is done. Local."""
        self._steps += 1
        self.meter.step()

    def figures(self, result: StepResult, seen: Observations, samples: int) -> dict[str, float]:
        """Of the logged step just done, and of speed and data since the last call. `samples`: seen by the whole run.

        Waits for the device. Collective: all ranks must call.
        """
        assert self.breakdown is not None
        measured: dict[str, Tensor] = {
            **collapse_statistics(seen, self._topology),
            **self._teacher.health(),
            **(self._diagnostics.figures(result.grad_norm) if result.applied else {}),
            **self.breakdown.figures(self._topology),
        }
        packed = torch.stack([value.to(self._topology.device, torch.float64) for value in measured.values()])
        values = dict(zip(measured, packed.tolist(), strict=True))
        speed = self.meter.read()
        elapsed = speed["step_seconds"] * self._steps
        self._totals.collect(self._loader.take_counts(), self._topology)
        completed = self._student.completed_updates
        if isinstance(self._student, PipelineStudent):
            values |= {f"pipeline_idle/stage_{i}": share for i, share in enumerate(self._student.idle_shares)}
        if (waited := self._teacher.waited_seconds()) is not None:
            values["ema_wait_seconds"] = (waited - self._ema_waited) / self._steps
            self._ema_waited = waited
        values |= {
            **speed,
            **host_values(),
            "samples_per_second": (samples - self._recorded_samples) / elapsed,
            "ema_seconds": seen.ema_time.seconds(),
            "grad_norm": result.grad_norm,
            "decay": ema.decay(self._recipe.objective.ema, max(1, completed)),
            "updates": completed,
            "skipped_updates": self._student.skipped_updates,
            **self._totals.figures(elapsed),
            **self._flops.figures(elapsed),
        }
        self._recorded_samples, self._steps = samples, 0
        self.records += 1
        return values

    def signs(self, values: dict[str, float]) -> list[str]:
        """What is unhealthy about these `figures` and the learning rate `lr`, in words."""
        return self._monitor.observe(values, self._student.completed_updates, values["decay"])

    @property
    def collapsed(self) -> bool:
        """Whether the run should end for it."""
        return self._monitor.collapsed

    @property
    def starved(self) -> str | None:
        """Why the run should end for want of data, as of the last `figures`; the same on all ranks."""
        return self._totals.starved()

    def state_dict(self) -> dict[str, object]:
        """What was read so far, for the checkpoint. Collective: all ranks must call."""
        self._totals.collect(self._loader.take_counts(), self._topology)
        return self._totals.state_dict()

    def load_state_dict(self, state: dict[str, object] | None, data: dict[str, object]) -> None:
        """Continue from `state` (None: the checkpoint has none) beside the loader's state `data`."""
        self._totals.load_state_dict(state, data)
