"""Fine-tuning, from the built parts to the last checkpoint: what `train.py` runs when the recipe has a `task`."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.checkpoint.memory import MemoryCopies, newest_anywhere
from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.checkpoint.training import pieces, restore, state
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.conversion import demo
from d2v_scale.finetuning.evaluation import TaskEvaluation
from d2v_scale.finetuning.loading import LabelledLoader, class_count
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.rates import freeze, set_task_rates, traits
from d2v_scale.finetuning.step import TaskObservations, task_step
from d2v_scale.interop.encoder_source import EncoderSource, check_tokenizer, write_encoder
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import make_optimizer, parameter_groups, scheduled, stem_scale
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StudentEngine, build_student
from d2v_scale.process.doing import doing
from d2v_scale.process.signals import StopReason
from d2v_scale.recipe import Recipe
from d2v_scale.running.loop import Taken
from d2v_scale.running.saving import open_copies, save
from d2v_scale.running.supervision import facts
from d2v_scale.running.totals import RunTotals
from d2v_scale.tracking import RunTracker, SpeedMeter, host_values

log = logging.getLogger("d2v_scale.train")


@dataclass
class TaskRun:
    """The parts of one fine-tuning run, and what the loop asks of it (`running.loop.AnyRun`)."""

    recipe: Recipe
    """With the number of classes, where the data say it."""
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    """The engine of the encoder and its head."""
    loader: LabelledLoader
    writer: CheckpointWriter
    copies: MemoryCopies | None
    tracker: RunTracker
    evaluation: TaskEvaluation | None
    totals: RunTotals
    """What the data gave, over all ranks and restarts."""
    rows: Tensor
    """float64 scalar on the device: labelled rows seen by all ranks since the run began."""
    meter: SpeedMeter = field(default_factory=SpeedMeter)
    step: int = 0
    """Steps taken, those included that were skipped because something was not finite."""
    saved: int = -1
    """Step of the last checkpoint begun."""
    recorded_samples: int = 0

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""
        return round(float(self.rows))

    def profiled(self) -> dict[str, nn.Module]:
        """The head."""
        return {"head": cast(TaskModel, self.student.module).head}

    def begin(self) -> None:
        """Save, so that the run can continue without the encoder that it began with. Collective."""
        if self.saved < 0:
            save(self)

    def reload(self) -> None:
        """Go back to the newest checkpoint. Collective."""
        checkpoint, _ = find_newest_valid(self.directory / "checkpoints", together=True)
        assert checkpoint is not None, "somebody saw one"
        load(self, checkpoint)
        self.saved = checkpoint.step

    def take_step(self, micro_batches: list[Batch], *, logged: bool) -> Taken[TaskObservations]:
        """Encoder and head on one step's micro-batches. Collective."""
        del logged
        recipe, student = self.recipe, self.student
        assert recipe.task is not None
        lr = set_task_rates(student.optimizer, recipe.optim, student.completed_updates)
        rates = scheduled(recipe.optim, lr, student.completed_updates)
        result, seen = task_step(student, micro_batches, recipe.task, Draw(recipe.seed, self.step))
        self.rows += seen.rows
        return Taken(result, seen, rates)

    def record(self, taken: Taken[TaskObservations]) -> list[tuple[StopReason, str]]:
        """Record the figures of the step just taken; no figure ends fine-tuning. Waits for the device. Collective."""
        loss = taken.seen.loss.clone()
        self.topology.sum_over_replicas(loss)
        samples, steps = self.samples, self.meter.steps
        speed = self.meter.read() | host_values()
        seconds = speed["step_seconds"] * steps
        speed["samples_per_second"] = (samples - self.recorded_samples) / seconds
        self.recorded_samples = samples
        values = {
            **taken.rates,
            "grad_norm": taken.result.grad_norm,
            "loss": float(loss),
            **speed,
        }
        values |= {"updates": self.student.completed_updates, "skipped_updates": self.student.skipped_updates}
        self.totals.collect(self.loader.take_counts(), self.topology)
        values |= self.totals.figures(seconds)
        self.tracker.log(self.step, samples, values)
        return []

    def evaluate(self) -> None:
        """The task's metrics on the held-out shards to the record, where the recipe names some, and how many samples
        they are of. Collective."""
        if self.evaluation is not None:
            measured = self.evaluation.measure()
            self.tracker.log(self.step, self.samples, {f"test/{name}": value for name, value in measured.items()})

    def draw_pictures(self) -> None:
        """There is no teacher to draw."""

    def contents(self) -> Contents:
        """What a checkpoint of this step holds. Collective."""
        self.totals.collect(self.loader.take_counts(), self.topology)
        extra = {**facts(self), "classes": self.loader.classes, "totals": self.totals.state_dict()}
        return Contents(pieces(self.student, None), state(self.student, None), extra)


def build(
    recipe: Recipe,
    options: Options,
    config: dict[str, Any],
    topology: Topology,
    directory: Path,
    encoder: EncoderSource | None,
) -> TaskRun:
    """All parts of the run, continued from its newest checkpoint if there is one, else begun from `encoder` (None: from
    scratch). Collective: all ranks must call."""
    task = recipe.task
    assert task is not None
    if options.resume is None:  # its data exist, elsewhere if not here
        demo.ensure([*(source.shards for source in recipe.data.sources), *recipe.evaluation.shards])
    with doing("reading the index of the shards, and their labels"):
        loader = LabelledLoader(
            task,
            recipe.data,
            recipe.model,
            seed=recipe.seed,
            global_batch_size=recipe.global_batch_size,
            batch_unit=recipe.batch_unit,
            accumulation=recipe.accumulation,
            dp_rank=topology.data_parallel_rank,
            dp_size=topology.data_parallel_size,
            device=topology.device,
        )
    if encoder is not None:
        shards = recipe.data.sources[0].shards
        check_tokenizer(encoder.path, encoder.tokenizer_sha256, shards, loader.tokenizer_sha256())
    if task.kind == "classify":
        task.classes = class_count(task, loader.classes)

    def begin(module: nn.Module) -> None:
        initialize(module, recipe.seed)
        if encoder is not None:
            write_encoder(module, encoder)

    def of_group(name: str) -> dict[str, float]:
        return traits(name, task, recipe.model, stem_scale(name, recipe.optim))

    with doing("building the model"):
        student = build_student(
            lambda: TaskModel(recipe.model, task),
            config,
            lambda named: make_optimizer(parameter_groups(freeze(named, task), recipe.optim, of_group), recipe.optim),
            topology,
            begin,
        )
    student.watch_spikes(recipe.optim.spikes)
    writer = CheckpointWriter.create(directory / "checkpoints", recipe.checkpoint)
    copies = open_copies(recipe, student, topology, directory)
    tracker = RunTracker(directory, recipe.tracking, is_main=topology.rank == 0)
    with doing("reading the held-out samples"):
        evaluation = TaskEvaluation.of(recipe, student, loader.classes)
    rows = torch.zeros((), dtype=torch.float64, device=topology.device)
    totals = RunTotals(loader.sources)
    run = TaskRun(
        recipe, options, topology, directory, student, loader, writer, copies, tracker, evaluation, totals, rows
    )
    with doing("reading the newest checkpoint"):
        checkpoint, run.saved = newest_anywhere(writer.root, copies)
        if checkpoint is None:
            log.info("Starting from %s", "scratch" if encoder is None else f"the encoder of {encoder.path}")
        else:
            load(run, checkpoint)
    return run


def load(run: TaskRun, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint of the run. Collective."""
    restore(checkpoint, run.student, None)
    run.step = checkpoint.step
    run.rows.fill_(checkpoint.extra["samples"])
    run.recorded_samples = run.samples
    run.loader.load_state_dict(checkpoint.extra["data"], checkpoint.extra.get("lately", ()))
    run.totals.load_state_dict(checkpoint.extra.get("totals"), checkpoint.extra["data"])
    if run.student.spikes is not None:
        run.student.spikes.rule.load_state_dict(checkpoint.extra.get("spikes"))
    log.info("Continuing at step %d from %s", run.step, checkpoint.path)
