"""Pretraining, from the built parts to the last checkpoint: what `train.py` runs when the recipe has no `task`."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.checkpoint import Checkpoint, find_newest_valid, open_any
from d2v_scale.checkpoint.memory import MemoryCopies, newest_anywhere
from d2v_scale.checkpoint.other_grid import OtherGrid
from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.checkpoint.training import pieces, restore, restore_weights, state
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.conversion import demo
from d2v_scale.data.loader import StepLoader
from d2v_scale.errors import CheckpointError
from d2v_scale.evaluation.of_stems import Evaluation
from d2v_scale.interop.encoder_source import check_tokenizer, open_encoder, recipe_of
from d2v_scale.modalities import position_tables
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import scheduled, set_rates
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.pretraining.engines import build_engines, describe_idle, read_encoder
from d2v_scale.pretraining.observing import RunObserver
from d2v_scale.pretraining.step import Observations, train_step
from d2v_scale.process.doing import doing
from d2v_scale.process.profiling import decoders
from d2v_scale.process.signals import StopReason
from d2v_scale.recipe import Recipe
from d2v_scale.running.loop import Taken
from d2v_scale.running.saving import open_copies
from d2v_scale.running.supervision import facts
from d2v_scale.teacher.sharded import EmaTeacher
from d2v_scale.tracking import RunTracker, SpeedMeter

log = logging.getLogger("d2v_scale.train")


@dataclass
class Run:
    """The parts of one run, and what the loop asks of it (`running.loop.AnyRun`)."""

    recipe: Recipe
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    teacher: EmaTeacher
    loader: StepLoader
    writer: CheckpointWriter
    copies: MemoryCopies | None
    tracker: RunTracker
    evaluation: Evaluation
    observer: RunObserver
    seen_samples: Tensor
    """float64 scalar on the device: samples seen by all ranks since the run began."""
    meter: SpeedMeter = field(default_factory=SpeedMeter)
    step: int = 0
    """Steps taken, those included that were skipped because something was not finite."""
    saved: int = -1
    """Step of the last checkpoint begun."""

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""
        return round(float(self.seen_samples))

    def profiled(self) -> dict[str, nn.Module]:
        """The decoders."""
        return decoders(self.student.module)

    def begin(self) -> None:
        """Rates count from here."""
        self.observer.start(self.samples)

    def reload(self) -> None:
        """Go back to the newest checkpoint. Collective."""
        self.teacher.wait()
        checkpoint, _ = find_newest_valid(self.directory / "checkpoints", together=True)
        assert checkpoint is not None, "somebody saw one"
        load(self, checkpoint)
        self.saved = checkpoint.step

    def take_step(self, micro_batches: list[Batch], *, logged: bool) -> Taken[Observations]:
        """Student and teacher on one step's micro-batches; the run's first batch is drawn, too. Collective."""
        self.observer.before(micro_batches, logged)
        if self.step == 0:
            with self.meter.paused():
                first = micro_batches[0]
                for part in first.of_stems:
                    kind = self.recipe.model.kind(part.modality)
                    # Of paired samples a picture for each part.
                    name = f"first_batch_{part.modality}" if first.parts else "first_batch"
                    self.tracker.preview(part, kind, self.loader.tokenizer(first.source), name)
        recipe, student = self.recipe, self.student
        lr = set_rates(student.optimizer, recipe.optim, student.completed_updates)
        rates = scheduled(recipe.optim, lr, student.completed_updates)
        result, seen = train_step(
            student,
            self.teacher,
            micro_batches,
            recipe.objective,
            Draw(recipe.seed, self.step),
            observe=logged,
            weights=recipe.data.loss_weights(),
            breakdown=self.observer.breakdown,
        )
        self.seen_samples += seen.samples
        return Taken(result, seen, rates)

    def record(self, taken: Taken[Observations]) -> list[tuple[StopReason, str]]:
        """Record the figures of the step just taken; why the run should stop for them. Waits for the device.
        Collective."""
        samples, observer = self.samples, self.observer
        values = {
            **observer.figures(taken.result, taken.seen, samples, self.meter),
            **taken.rates,
        }
        self.tracker.log(self.step, samples, values)
        if self.student.idle_shares and observer.records == 2:
            self.tracker.message(describe_idle(self.student.idle_shares, self.recipe.accumulation))
        signs = observer.signs(values)
        for sign in signs:
            self.tracker.message(f"step {self.step}: {sign}")
        verdicts = [(StopReason.COLLAPSE, "; ".join(signs))] if observer.collapsed else []
        return verdicts if observer.starved is None else [*verdicts, (StopReason.DATA_STARVED, observer.starved)]

    def evaluate(self) -> None:
        """To the record: k-NN and held-out loss where the recipe names shards for them, what the layers do, of every
        stem. Collective."""
        if values := self.evaluation.figures():
            self.tracker.log(self.step, self.samples, values)

    def draw_pictures(self) -> None:
        """Have pictures drawn of what the teacher makes of some samples. Collective."""
        self.tracker.pictures(self.step, list(self.evaluation.galleries(self.step)))

    def contents(self) -> Contents:
        """What a checkpoint of this step holds. Collective."""
        extra = {**facts(self), "totals": self.observer.state_dict(), "health": self.observer.health_state()}
        return Contents(pieces(self.student, self.teacher), state(self.student, self.teacher), extra)


def build(
    recipe: Recipe,
    options: Options,
    config: dict[str, Any],
    topology: Topology,
    directory: Path,
) -> Run:
    """All parts of the run, restored from the newest checkpoint if there is one. Collective: all ranks must call."""
    if options.resume is None:  # its data exist, elsewhere if not here
        demo.ensure([*(source.shards for source in recipe.data.sources), *recipe.evaluation.shards])
    with doing("reading the index of the shards"):
        loader = StepLoader(
            recipe.data,
            recipe.model,
            recipe.masking(),
            recipe.objective.compat,
            seed=recipe.seed,
            global_batch_size=recipe.global_batch_size,
            batch_unit=recipe.batch_unit,
            accumulation=recipe.accumulation,
            dp_rank=topology.data_parallel_rank,
            dp_size=topology.data_parallel_size,
            device=topology.device,
        )
    with doing("building student and teacher"):
        student, teacher = build_engines(recipe, config, topology)
        student.watch_spikes(recipe.optim.spikes)
    writer = CheckpointWriter.create(directory / "checkpoints", recipe.checkpoint)
    copies = open_copies(recipe, student, topology, directory)
    tracker = RunTracker(directory, recipe.tracking, is_main=topology.rank == 0)
    with doing("reading the samples that are measured on"):
        evaluation = Evaluation(recipe, student, teacher)
    run = Run(
        recipe=recipe,
        options=options,
        topology=topology,
        directory=directory,
        student=student,
        teacher=teacher,
        loader=loader,
        writer=writer,
        copies=copies,
        tracker=tracker,
        evaluation=evaluation,
        observer=RunObserver(recipe, student, teacher, loader),
        seen_samples=torch.zeros((), dtype=torch.float64, device=topology.device),
    )
    with doing("reading the newest checkpoint"):
        checkpoint, run.saved = newest_anywhere(writer.root, copies)
        load(run, checkpoint)
    return run


def load(run: Run, checkpoint: Checkpoint | None) -> None:
    """Continue from a checkpoint of the run; without one start from `--init_from` and with the teacher that
    `teacher.checkpoint` names. Collective."""
    if checkpoint is not None:
        restore(_on_grid(checkpoint, run.recipe), run.student, run.teacher)
        run.step = checkpoint.step
        run.seen_samples.fill_(checkpoint.extra["samples"])
        run.loader.load_state_dict(checkpoint.extra["data"], checkpoint.extra.get("lately", ()))
        run.observer.load_state_dict(checkpoint.extra.get("totals"), checkpoint.extra["data"])
        run.observer.load_health(checkpoint.extra.get("health"))
        if run.student.spikes is not None:
            run.student.spikes.rule.load_state_dict(checkpoint.extra.get("spikes"))
        log.info("Continuing at step %d from %s", run.step, checkpoint.path)
        return
    if run.recipe.teacher.kind == "checkpoint":
        _load_teacher(run)
    if run.options.init_from is not None:
        source: Checkpoint = open_any(run.options.init_from, together=True)
        restore_weights(_on_grid(source, run.recipe), run.student, run.teacher, reset_teacher=run.options.reset_teacher)
        log.info("Starting from the weights of %s", source.path)


def _load_teacher(run: Run) -> None:
    """Give the teacher the weights of the encoder that the recipe names: the same one on every rank, though its run may
    still write checkpoints. Raises CheckpointError, and DataError for ids of another tokenizer. Collective."""
    recipe = run.recipe
    assert recipe.teacher.checkpoint is not None
    encoder = open_encoder(recipe.teacher.checkpoint, together=True)
    texts = [one.shards for one in recipe.data.sources if recipe.model.kind(one.modality) == "text"]
    for shards in texts[:1]:  # which the loader's checksum is of
        check_tokenizer(encoder.path, encoder.tokenizer_sha256, shards, run.loader.tokenizer_sha256())
    read_encoder(run.teacher, encoder)
    log.info("The teacher is the encoder of %s", encoder.path)


def _on_grid(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint as the recipe's model takes it: position tables of another resolution are laid over its own."""
    wanted = position_tables(recipe.model)
    if not wanted:
        return checkpoint
    try:
        was = position_tables(recipe_of(checkpoint).model)
    except CheckpointError as error:  # the names and shapes of its tensors say whether it fits as it is
        log.info("Tables of positions are taken as they are: %s", error)
        return checkpoint
    differ = {
        name: (was[name], table)
        for name, table in wanted.items()
        if name in was and was[name] != table and len(was[name].grid) == len(table.grid)
    }
    for name, (old, new) in differ.items():
        log.info("%s: %s positions become %s", name, "x".join(map(str, old.grid)), "x".join(map(str, new.grid)))
    return OtherGrid(checkpoint, differ) if differ else checkpoint
