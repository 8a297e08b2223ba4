"""Fine-tuning, from the built parts to the last checkpoint: what `train.py` runs when the recipe has a `task`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_scale.checkpoint import find_newest_valid
from d2v_scale.checkpoint.training import pieces, restore, state
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.data import demo
from d2v_scale.data.totals import RunTotals
from d2v_scale.finetuning.evaluation import TaskEvaluation
from d2v_scale.finetuning.loading import LabelledLoader, class_count
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.rates import freeze, set_task_rates, traits
from d2v_scale.finetuning.step import TaskObservations, task_step
from d2v_scale.interop.encoder_source import EncoderSource, check_tokenizer, write_encoder
from d2v_scale.model.init import initialize
from d2v_scale.model.stack import Draw
from d2v_scale.optim import make_optimizer, parameter_groups
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StudentEngine, build_student
from d2v_scale.profiling import StepProfiler, part
from d2v_scale.recipe import Recipe
from d2v_scale.signals import Agreement, Stop, StopFlag
from d2v_scale.supervision import facts, judge, last_step, report_saves
from d2v_scale.tracking import RunTracker, SpeedMeter, host_values
from d2v_scale.watchdog import Watchdog

log = logging.getLogger("d2v_scale.train")


@dataclass
class TaskRun:
    """The parts of one fine-tuning run."""

    recipe: Recipe
    """With the number of classes, where the data say it."""
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    """The engine of the encoder and its head."""
    loader: LabelledLoader
    writer: CheckpointWriter
    tracker: RunTracker
    evaluation: TaskEvaluation | None
    totals: RunTotals
    """What the data gave, over all ranks and restarts."""
    rows: Tensor
    """float64 scalar on the device: labelled rows seen by all ranks since the run began."""
    step: int = 0
    """Steps taken, those included that were skipped because something was not finite."""
    saved: int = -1
    """Step of the last checkpoint begun."""
    recorded_step: int = 0
    recorded_samples: int = 0

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""
        return round(float(self.rows))


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
        demo.ensure([*(source.shards for source in recipe.data.sources), recipe.evaluation.test])
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

    student = build_student(
        lambda: TaskModel(recipe.model, task),
        config,
        lambda named: make_optimizer(
            parameter_groups(freeze(named, task), recipe.optim, lambda name: traits(name, task, recipe.model)),
            recipe.optim,
        ),
        topology,
        begin,
    )
    writer = CheckpointWriter.create(directory / "checkpoints", recipe.checkpoint)
    tracker = RunTracker(directory, recipe.tracking, is_main=topology.rank == 0)
    evaluation = TaskEvaluation.of(recipe, student, loader.classes)
    rows = torch.zeros((), dtype=torch.float64, device=topology.device)
    totals = RunTotals(loader.sources)
    run = TaskRun(recipe, options, topology, directory, student, loader, writer, tracker, evaluation, totals, rows)
    load(run, encoder)
    return run


def load(run: TaskRun, encoder: EncoderSource | None) -> None:
    """Continue from the newest valid checkpoint of the run directory, if there is one. Collective."""
    checkpoint, _ = find_newest_valid(run.directory / "checkpoints", together=True)
    if checkpoint is None:
        log.info("Starting from %s", "scratch" if encoder is None else f"the encoder of {encoder.path}")
        return
    restore(checkpoint, run.student, None)
    run.step = run.saved = checkpoint.step
    run.rows.fill_(checkpoint.extra["samples"])
    run.recorded_step, run.recorded_samples = run.step, run.samples
    run.loader.load_state_dict(checkpoint.extra["data"])
    run.totals.load_state_dict(checkpoint.extra.get("totals"), checkpoint.extra["data"])
    log.info("Continuing at step %d from %s", run.step, checkpoint.path)


def train(run: TaskRun, stop_flag: StopFlag, agreement: Agreement, watchdog: Watchdog) -> Stop | None:
    """The training loop. Returns why all ranks stop before the last step, None if they reached it. Collective."""
    recipe, student = run.recipe, run.student
    task, end = recipe.task, last_step(run)
    assert task is not None
    if run.step >= end:
        return None
    meter = SpeedMeter()
    student.module.train()
    if run.step == 0:
        evaluate(run)
    if run.saved < 0:
        # So that the run can continue without the encoder that it began with.
        save(run)
    stop_flag.starting = False
    batches = iter(run.loader)
    head = cast(TaskModel, student.module).head
    profiler = StepProfiler(recipe.profile, run.directory, {"head": head}, rank=run.topology.rank)
    while run.step < end:
        profiler.begin(run.step + 1)
        with part("data"), meter.waiting("data"):
            micro_batches = next(batches)
        lr = set_task_rates(student.optimizer, recipe.optim, student.completed_updates)
        result, seen = task_step(student, micro_batches, task, Draw(recipe.seed, run.step))
        run.step += 1
        profiler.end(run.step)
        run.rows += seen.rows
        meter.step()
        judge(run, result, stop_flag)
        if run.tracker.due(run.step, end):
            record(run, seen, {"lr": lr, "grad_norm": result.grad_norm}, meter)
        if run.step == end or (recipe.evaluation.every and run.step % recipe.evaluation.every == 0):
            with meter.paused():
                evaluate(run)
        if recipe.checkpoint.due(run.step):
            with meter.paused():
                save(run)
        report_saves(run)
        watchdog.beat(run.step)
        stop = agreement.agree(stop_flag.raised())
        if stop is not None:
            return stop
    return agreement.conclude()


def record(run: TaskRun, seen: TaskObservations, values: dict[str, float], meter: SpeedMeter) -> None:
    """Record the figures of this step. Waits for the device. Collective."""
    loss = seen.loss.clone()
    run.topology.sum_over_replicas(loss)
    samples = run.samples
    speed = meter.read() | host_values()
    seconds = speed["step_seconds"] * (run.step - run.recorded_step)
    speed["samples_per_second"] = (samples - run.recorded_samples) / seconds
    run.recorded_samples, run.recorded_step = samples, run.step
    values |= {"loss": float(loss), **speed}
    values |= {"updates": run.student.completed_updates, "skipped_updates": run.student.skipped_updates}
    run.totals.collect(run.loader.take_counts(), run.topology)
    values |= run.totals.figures(seconds)
    run.tracker.log(run.step, samples, values)


def evaluate(run: TaskRun) -> None:
    """The task's metrics on the held-out shards to the record, where the recipe names some, and how many samples they
    are of. Collective."""
    if run.evaluation is not None:
        measured = run.evaluation.measure()
        run.tracker.log(run.step, run.samples, {f"test/{name}": value for name, value in measured.items()})


def save(run: TaskRun) -> None:
    """Begin a checkpoint of this step; the loop waits for the snapshot only. Collective."""
    run.tracker.flush()
    run.totals.collect(run.loader.take_counts(), run.topology)
    extra = {**facts(run), "classes": run.loader.classes, "totals": run.totals.state_dict()}
    stall = run.writer.save(run.step, pieces(run.student, None), state(run.student, None), extra)
    run.tracker.log(run.step, run.samples, {"checkpoint_stall_seconds": stall})
    run.saved = run.step
