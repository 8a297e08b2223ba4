"""Pretraining, from the command line to the last checkpoint: `deepspeed d2v_scale/train.py [--recipe NAME] ...`."""

import sys

if __name__ == "__main__":
    # A script's own folder comes first on sys.path, where this package's modules would stand in for others' names.
    del sys.path[0]
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from d2v_scale.parallel import rank_environment as _rank_environment
    from d2v_scale.signals import StopFlag as _StopFlag

    _flag = _StopFlag.install()
    # Libraries read it once, when torch is imported or a GPU first used.
    _rank_environment.prepare()
    from d2v_scale.train import main as _main

    sys.exit(_main(sys.argv[1:], _flag))

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale import command_line, run_directory, run_lock
from d2v_scale.checkpoint import Checkpoint, find_newest_valid, open_any
from d2v_scale.checkpoint.training import pieces, restore, restore_weights, state
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.data import demo
from d2v_scale.data.loader import StepLoader
from d2v_scale.engines import build_engines, describe_idle
from d2v_scale.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, ConfigError, UserError, Verdict
from d2v_scale.evaluation.held_out import HeldOutSet
from d2v_scale.evaluation.online import OnlineEvaluation
from d2v_scale.finetuning import program
from d2v_scale.finetuning.start import adopt
from d2v_scale.model import attention_kernels
from d2v_scale.model.stack import Draw
from d2v_scale.observing import RunObserver
from d2v_scale.optim import set_rates
from d2v_scale.parallel import ds_config, groups, launchers
from d2v_scale.parallel.feed import SharedFeed
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.pipeline import PipelineStudent
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.planning import legal
from d2v_scale.profiling import StepProfiler, decoders, part
from d2v_scale.recipe import Recipe
from d2v_scale.recipe_paths import check_complete
from d2v_scale.redaction import RedactingFormatter
from d2v_scale.signals import Agreement, Stop, StopFlag, StopReason, is_lost_peer
from d2v_scale.status import write_status
from d2v_scale.step import Observations, train_step
from d2v_scale.supervision import facts, judge, last_step, report_saves, supervise
from d2v_scale.teacher import EmaTeacher
from d2v_scale.tracking import RunTracker
from d2v_scale.watchdog import Watchdog, collective_timeout_s

log = logging.getLogger("d2v_scale.train")

DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 1}}


@dataclass
class Run:
    """The parts of one run."""

    recipe: Recipe
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    teacher: EmaTeacher
    loader: StepLoader
    writer: CheckpointWriter
    tracker: RunTracker
    evaluation: OnlineEvaluation | None
    held_out: HeldOutSet | None
    observer: RunObserver
    seen_samples: Tensor
    """float64 scalar on the device: samples seen by all ranks since the run began."""
    step: int = 0
    """Steps taken, those included that were skipped because something was not finite."""
    saved: int = -1
    """Step of the last checkpoint begun."""

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""
        return round(float(self.seen_samples))


def main(arguments: list[str], stop_flag: StopFlag) -> int:
    """Run the program; returns the exit code that status.json also holds."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal])
    directory: Path | None = None
    rank = 0
    try:
        rank = launchers.adopt().rank
        if rank != 0:
            logging.getLogger().setLevel(logging.ERROR)
        recipe, options = command_line.parse(arguments)
        encoder = None if recipe.task is None else adopt(recipe, options)
        config = configure(recipe)
        patience_s = collective_timeout_s(recipe.hang_limit_minutes * 60, recipe.checkpoint.peer_timeout)
        topology = groups.initialize(recipe.parallel, patience_s / 60)
        directory = run_directory.claim(recipe, options, config, topology)
        run_directory.log_to_file(directory, topology.rank)
        if topology.device.type == "cuda" and topology.rank == 0:
            log.info("%s", attention_kernels.describe(torch.cuda.get_device_name(topology.device)))
        if recipe.task is None:
            run = build(recipe, options, config, topology, directory)
            code = supervise(run, stop_flag, train, save)
        else:
            tuning = program.build(recipe, options, config, topology, directory, encoder)
            code = supervise(tuning, stop_flag, program.train, program.save)
    except Exception as error:
        code = failed(error, directory, rank)
        run_lock.release()
        # Peers may still wait in a collective that this rank will never join: leave without saying goodbye.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    groups.shutdown()
    run_lock.release()
    return code


def configure(recipe: Recipe) -> dict[str, Any]:
    """Check the recipe against itself, the world size and the DeepSpeed JSON; returns DeepSpeed's configuration.

    Raises ConfigError before any process group is formed.
    """
    world_size = launchers.world_size()
    check_complete(recipe)
    recipe.check(world_size)
    recipe.data.check(recipe.model.modalities)
    has_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    raw = ds_config.read(recipe.deepspeed_config) if recipe.deepspeed_config else DEFAULT_DEEPSPEED
    config = legal.deepspeed_config(recipe, raw, world_size, has_gpu=has_gpu)
    for line in ds_config.remarks(raw, recipe.optim):
        log.info("%s", line)
    return config


def build(recipe: Recipe, options: Options, config: dict[str, Any], topology: Topology, directory: Path) -> Run:
    """All parts of the run, restored from the newest checkpoint if there is one. Collective: all ranks must call."""
    shown = recipe.evaluation
    if options.resume is None:  # its data exist, elsewhere if not here
        demo.ensure([*(source.shards for source in recipe.data.sources), shown.train, shown.test, shown.held_out])
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
    student, teacher = build_engines(recipe, config, topology)
    writer = CheckpointWriter.create(directory / "checkpoints", recipe.checkpoint)
    tracker = RunTracker(directory, recipe.tracking, is_main=topology.rank == 0)
    run = Run(
        recipe=recipe,
        options=options,
        topology=topology,
        directory=directory,
        student=student,
        teacher=teacher,
        loader=loader,
        writer=writer,
        tracker=tracker,
        evaluation=OnlineEvaluation.of(recipe, student, teacher),
        held_out=HeldOutSet.of(recipe, student, teacher),
        observer=RunObserver(recipe, student, teacher, loader),
        seen_samples=torch.zeros((), dtype=torch.float64, device=topology.device),
    )
    load(run)
    return run


def load(run: Run) -> None:
    """Continue from the newest valid checkpoint of the run directory, or start from `--init_from`. Collective."""
    checkpoint, _ = find_newest_valid(run.directory / "checkpoints", together=True)
    if checkpoint is not None:
        restore(checkpoint, run.student, run.teacher)
        run.step = run.saved = checkpoint.step
        run.seen_samples.fill_(checkpoint.extra["samples"])
        run.loader.load_state_dict(checkpoint.extra["data"])
        run.observer.load_state_dict(checkpoint.extra.get("totals"), checkpoint.extra["data"])
        run.observer.load_health(checkpoint.extra.get("health"))
        log.info("Continuing at step %d from %s", run.step, checkpoint.path)
    elif run.options.init_from is not None:
        source: Checkpoint = open_any(run.options.init_from, together=True)
        restore_weights(source, run.student, run.teacher, reset_teacher=run.options.reset_teacher)
        log.info("Starting from the weights of %s", source.path)


def train(run: Run, stop_flag: StopFlag, agreement: Agreement, watchdog: Watchdog) -> Stop | None:
    """The training loop. Returns why all ranks stop before the last step, None if they reached it. Collective."""
    recipe, student, teacher, observer = run.recipe, run.student, run.teacher, run.observer
    end = last_step(run)
    if run.step >= end:
        return None
    student.module.train()
    if run.step == 0:
        evaluate(run)
    stop_flag.starting = False
    batches = SharedFeed(run.loader, run.topology)
    profiler = StepProfiler(recipe.profile, run.directory, decoders(student.module), rank=run.topology.rank)
    observer.start(run.samples)
    while run.step < end:
        profiler.begin(run.step + 1)
        with part("data"), observer.meter.waiting("data"):
            micro_batches = next(batches)
        logged = run.tracker.due(run.step + 1, end)
        observer.before(micro_batches, logged)
        if run.step == 0:
            with observer.meter.paused():
                run.tracker.preview(micro_batches[0], run.loader.tokenizer(micro_batches[0].source))
        lr = set_rates(student.optimizer, recipe.optim, student.completed_updates)
        draw = Draw(recipe.seed, run.step)
        result, seen = train_step(
            student, teacher, micro_batches, recipe.objective, draw, observe=logged, breakdown=observer.breakdown
        )
        run.step += 1
        profiler.end(run.step)
        run.seen_samples += seen.samples
        observer.after()
        judge(run, result, stop_flag)
        if logged:
            signs = record(run, result, seen, lr)
            if observer.collapsed:
                stop_flag.up(StopReason.COLLAPSE, "; ".join(signs))
            if observer.starved is not None:
                stop_flag.up(StopReason.DATA_STARVED, observer.starved)
        if run.step == end or (recipe.evaluation.every and run.step % recipe.evaluation.every == 0):
            with observer.meter.paused():
                evaluate(run)
        plot_every = recipe.tracking.plot_every
        if (run.step == end and plot_every is not None) or (plot_every and run.step % plot_every == 0):
            with observer.meter.paused():
                draw_pictures(run)
        if recipe.checkpoint.due(run.step):
            with observer.meter.paused():
                save(run)
        report_saves(run)
        watchdog.beat(run.step)
        stop = agreement.agree(stop_flag.raised())
        if stop is not None:
            return stop
    return agreement.conclude()


def record(run: Run, result: StepResult, seen: Observations, lr: float) -> list[str]:
    """Record the figures of this step; what is unhealthy about them. Waits for the device. Collective."""
    samples = run.samples
    values = {**run.observer.figures(result, seen, samples), "lr": lr}
    run.tracker.log(run.step, samples, values)
    if isinstance(run.student, PipelineStudent) and run.observer.records == 2:
        run.tracker.message(describe_idle(run.student.idle_shares, run.recipe.accumulation))
    signs = run.observer.signs(values)
    for sign in signs:
        run.tracker.message(f"step {run.step}: {sign}")
    return signs


def evaluate(run: Run) -> None:
    """To the record: k-NN and held-out loss where the recipe names shards for them, what the layers do. Collective."""
    sets = (run.evaluation, run.held_out)
    values = {name: value for one in sets if one is not None for name, value in one.figures().items()}
    if values:
        run.tracker.log(run.step, run.samples, values)


def draw_pictures(run: Run) -> None:
    """Have pictures drawn of what the teacher makes of some samples. Collective."""
    if run.evaluation is not None:
        run.tracker.gallery(run.evaluation.gallery(run.recipe, run.step))


def save(run: Run) -> None:
    """Begin a checkpoint of this step; the loop waits for the snapshot only. Collective."""
    run.tracker.flush()
    extra = {**facts(run), "totals": run.observer.state_dict(), "health": run.observer.health_state()}
    held = pieces(run.student, run.teacher)
    stall = run.writer.save(run.step, held, state(run.student, run.teacher), extra)
    run.tracker.log(run.step, run.samples, {"checkpoint_stall_seconds": stall})
    run.saved = run.step


def failed(error: Exception, directory: Path | None, rank: int) -> int:
    """Explain an error at the terminal, in this rank's log and in status.json; returns the exit code."""
    if isinstance(error, UserError):
        code, reason = EXIT_BAD_INPUT, str(error)
        # Other ranks, too: one node may lack the data that the others have. But all have the same arguments.
        if rank == 0 or not isinstance(error, ConfigError):
            log.error("%serror: %s", f"rank {rank}: " if rank else "", reason)
    else:
        lost = is_lost_peer(error)
        code = EXIT_LOST_PEER if lost else getattr(error, "exit_code", 1) if isinstance(error, Verdict) else 1
        reason = f"{type(error).__name__}: {error}"
        log.error("%s", reason, exc_info=not isinstance(error, Verdict))
    if directory is not None:
        write_status(directory, code, reason)
    return code
