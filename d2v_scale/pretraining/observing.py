"""All that is measured of a step that is logged, put together: what `train` records and judges."""

from collections.abc import Collection
from typing import Any, cast

from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec import ema
from d2v_scale.networks.stack import Teacher
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.pretraining.breakdown import OF_A_SOURCE, LossBreakdown, spread_name
from d2v_scale.pretraining.diagnostics import StepDiagnostics
from d2v_scale.pretraining.health import HealthMonitor
from d2v_scale.pretraining.step import OF_A_STEP, Observations, collapse_statistics, read
from d2v_scale.pretraining.utilisation import FlopMeter
from d2v_scale.recipe import Recipe
from d2v_scale.running.totals import RunTotals
from d2v_scale.teacher.sharded import EmaTeacher
from d2v_scale.tracking import SpeedMeter, host_values


class RunObserver:
    """Call `before` every step, and `figures` after those that are logged."""

    def __init__(self, recipe: Recipe, student: StudentEngine, teacher: EmaTeacher, loader: StepLoader) -> None:
        self._recipe, self._student, self._teacher, self._loader = recipe, student, teacher, loader
        self._topology = student.topology
        self._diagnostics = StepDiagnostics(student, recipe.model.backbone.depth)
        self._flops = FlopMeter(
            recipe.model,
            recipe.parts(),
            self._topology,
            recipe.tracking.peak_tflops,
            cast(Teacher, teacher.module).targets,
            recipe.teacher.model,
            [stem for stem in recipe.model.modalities if recipe.objective.reads_states(stem)],
        )
        self._totals = RunTotals(loader.sources)
        observed = recipe.data.observed()
        own = {name: recipe.objective.of(stem).health for name, stem in observed.items()}
        # What is measured of a single source bears no name.
        of_all = next(iter(own.values())) if len(own) == 1 else recipe.objective.health
        self._monitor = HealthMonitor(of_all, own)
        self._recorded_samples = 0
        self.records = 0
        """Logged steps of this process."""
        self._ema_waited = 0.0
        self._sources = list(observed)
        targets = cast(Teacher, teacher.module).targets
        self._told_apart = self._sources if len(self._sources) > 1 else []
        self._widths = {
            name: (target.raw_width, target.width)
            for source, stem in observed.items()
            for number, target in enumerate(targets[stem])
            if (name := spread_name(source, target.config.called, number, several=len(observed) > 1))
        }
        """Of every source, and of every target but the first, whose spread is that of all."""
        several = [each for each in targets.values() if len(each) > 1]
        self._targets = list(dict.fromkeys(one.config.called for each in several for one in each))
        """What more than one target is regressed of is told apart."""
        self._by_source = self._new_breakdown()
        self._measured: set[str] = set()
        """Sources with a step in `_by_source`."""
        self._judged: set[str] = set()
        """Those whose spread in the last figures is a new one."""
        self._latest: dict[str, float] = {}
        """Last figures of every source."""
        self.breakdown: LossBreakdown | None = None
        """Where the step in progress puts its loss by source; None: it is not looked at."""

    def start(self, samples: int) -> None:
        """Training begins or goes on here, after `samples`; steps that were looked at before do not count."""
        self._recorded_samples = samples
        self._by_source, self._measured = self._new_breakdown(), set()
        self._flops.restart()
        self._ema_waited = self._teacher.waited_seconds() or 0.0

    def before(self, micro_batches: list[Batch], logged: bool) -> None:
        """Get ready for a step. Local.

        A logged step is looked at, and of several sources the first step of each since the last log point: a source
        that is read rarely would wait long for a log point to fall on its step.
        """
        self._flops.count(micro_batches)
        sources = {own.source for batch in micro_batches for own in batch.of_stems}
        looked_at = logged or (len(self._sources) > 1 and not sources <= self._measured)
        self.breakdown = self._by_source if looked_at else None
        if looked_at:
            self._measured |= sources
        if logged:
            self._diagnostics.arm()

    def _new_breakdown(self) -> LossBreakdown:
        return LossBreakdown(self._sources, self._topology.device, self._widths, self._targets)

    def figures(self, result: StepResult, seen: Observations, samples: int, meter: SpeedMeter) -> dict[str, float]:
        """Of the logged step just done, and of speed and data since the last call. `samples`: seen by the whole run.

        Of several sources each has its figures at every call, those of its last step that was looked at.

        Waits for the device. Collective: all ranks must call.
        """
        assert self.breakdown is not None
        measured: dict[str, Tensor] = {
            **collapse_statistics(seen, self._topology, self._told_apart),
            **self._teacher.health(),
            **(self._diagnostics.figures(result.grad_norm) if result.applied else {}),
            **self.breakdown.figures(self._topology),
        }
        values = read(measured, seen)
        self._judged = {source for source in self._sources if f"target_std/{source}" in values}
        # Of a source that was looked at and lost all its samples nothing is known: its last figures are not new ones.
        kept = {name: value for name, value in self._latest.items() if not self._is_new(name, seen.sources)}
        self._latest = kept | {name: value for name, value in values.items() if self._is_new(name, seen.sources)}
        values |= self._latest
        self._by_source, self._measured = self._new_breakdown(), set()
        steps, speed = meter.steps, meter.read()
        elapsed = speed["step_seconds"] * steps
        self._totals.collect(self._loader.take_counts(), self._topology)
        completed = self._student.completed_updates
        values |= {f"pipeline_idle/stage_{i}": share for i, share in enumerate(self._student.idle_shares)}
        if (waited := self._teacher.waited_seconds()) is not None:
            values["ema_wait_seconds"] = (waited - self._ema_waited) / steps
            self._ema_waited = waited
        values |= {
            **speed,
            **host_values(),
            "samples_per_second": (samples - self._recorded_samples) / elapsed,
            "ema_seconds": seen.ema_time.seconds(),
            "grad_norm": result.grad_norm,
            "decay": ema.decay(self._recipe.objective.ema, max(1, completed)) if self._teacher.follows else 1.0,
            "updates": completed,
            "skipped_updates": self._student.skipped_updates,
            **self._totals.figures(elapsed),
            **self._flops.figures(elapsed),
        }
        self._recorded_samples = samples
        self.records += 1
        return values

    def _is_new(self, name: str, of_step: Collection[str]) -> bool:
        """Whether a figure is one that a source has by itself, and what was looked at since the last call, or in the
        step just done (`of_step`), tells it anew."""
        figure, _, rest = name.partition("/")
        looked_at = self._measured if figure in OF_A_SOURCE else of_step if figure in OF_A_STEP else ()
        return any(
            rest == source or rest.startswith(f"{source}/") for source in self._told_apart if source in looked_at
        )

    def signs(self, values: dict[str, float]) -> list[str]:
        """What is unhealthy about these `figures` and the learning rate `lr`, in words."""
        return self._monitor.observe(values, self._student.completed_updates, values["decay"], self._judged)

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

    def health_state(self) -> dict[str, object]:
        """How long each sign has been bad, and the last figures of every source, for the checkpoint."""
        return {"unhealthy": dict(self._monitor.unhealthy), "sources": dict(self._latest)}

    def load_health(self, state: dict[str, Any] | None) -> None:
        """Continue from `health_state`; None: the checkpoint has none."""
        if state is not None:
            self._monitor.unhealthy = {name: int(times) for name, times in state["unhealthy"].items()}
            self._latest = {name: float(value) for name, value in state["sources"].items()}

    def load_state_dict(self, state: dict[str, object] | None, data: dict[str, object]) -> None:
        """Continue from `state` (None: the checkpoint has none) beside the loader's state `data`."""
        self._totals.load_state_dict(state, data)
