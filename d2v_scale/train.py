"""The training program: `deepspeed d2v_scale/train.py [--recipe NAME] ...`.

`main` reads the recipe from the command line, checks it against this world (`configure`), forms the process groups,
claims the run directory, builds the run (`pretraining/program.py`; `finetuning/program.py` where the recipe has a task)
and trains it (`running/loop.py` inside `supervision.py`). Whatever goes wrong, `failed` says why and with which exit
code.
"""

import sys

if __name__ == "__main__":
    # A script's own folder comes first on sys.path, where this package's modules would stand in for others' names.
    del sys.path[0]
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from d2v_scale.parallel import rank_environment as _rank_environment
    from d2v_scale.process.signals import StopFlag as _StopFlag

    _flag = _StopFlag.install()
    # Libraries read it once, when torch is imported or a GPU first used.
    _rank_environment.prepare()
    from d2v_scale.train import main as _main

    sys.exit(_main(sys.argv[1:], _flag))

import logging
import os
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What a mistake is found with. torch, and what imports it, comes once there is none: `main`.
from d2v_scale import command_line
from d2v_scale.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, ConfigError, UserError, Verdict
from d2v_scale.finetuning.start import adopt
from d2v_scale.interop.teacher_model import adopt_teacher
from d2v_scale.parallel import ds_config, launchers, rank_environment
from d2v_scale.planning import legal
from d2v_scale.process import host_memory
from d2v_scale.process.doing import doing
from d2v_scale.process.signals import StopFlag, is_lost_peer
from d2v_scale.process.started import tell_run_dir
from d2v_scale.process.status import write_status
from d2v_scale.process.watchdog import collective_timeout_s
from d2v_scale.recipe import Recipe
from d2v_scale.redaction import RedactingFormatter
from d2v_scale.run_files import raw_data, run_lock
from d2v_scale.run_files.recipe_paths import check_complete, find_data

if TYPE_CHECKING:
    from d2v_scale.running.loop import AnyRun


class _Callable(types.ModuleType):
    """This module, where it was imported and so stands on the package in place of the function of its name."""

    def __call__(self, *arguments: Any, **overrides: Any) -> Path:
        from d2v_scale.api.training import train

        return train(*arguments, **overrides)


sys.modules[__name__].__class__ = _Callable

log = logging.getLogger("d2v_scale.train")

DEFAULT_DEEPSPEED = {"zero_optimization": {"stage": 1}}


def main(arguments: list[str], stop_flag: StopFlag) -> int:
    """Run the program; returns the exit code that status.json also holds."""
    terminal = logging.StreamHandler()
    terminal.setFormatter(RedactingFormatter("%(message)s"))
    # Libraries say more only where they are asked for it.
    logging.basicConfig(level=os.environ.get("D2V_DEEPSPEED_LOG", "WARNING"), handlers=[terminal])
    logging.getLogger("d2v_scale").setLevel(logging.INFO)
    directory: Path | None = None
    run: AnyRun[Any] | None = None
    rank = 0
    try:
        rank = launchers.adopt().rank
        if rank != 0:
            terminal.setLevel(logging.ERROR)
        with doing("reading the recipe"):
            recipe, options = command_line.parse(arguments)
        encoder = None if recipe.task is None else adopt(recipe, options)
        if recipe.task is None:
            adopt_teacher(recipe, options)
        config = configure(recipe)
        if options.prepare:
            raw_data.prepare(recipe, options.run_dir or options.resume, lambda: stop_flag.raised() is not None)
        find_data(recipe, rank)

        with doing("loading PyTorch, DeepSpeed and megatron-core"):
            import torch

            from d2v_scale.finetuning import program as finetuning
            from d2v_scale.model import attention_kernels
            from d2v_scale.parallel import groups
            from d2v_scale.pretraining import program as pretraining
            from d2v_scale.running import arithmetic, run_directory
            from d2v_scale.running.supervision import supervise

            groups.prepare_accelerator()
        patience_s = collective_timeout_s(recipe.hang_limit_minutes * 60, recipe.checkpoint.peer_timeout)
        topology = groups.initialize(recipe.parallel, patience_s / 60)
        directory = run_directory.claim(recipe, options, config, topology)
        if topology.rank == 0:
            tell_run_dir(directory)
        run_directory.log_to_file(directory, topology.rank)
        if topology.device.type == "cpu":
            host_memory.keep_freed()
        config = arithmetic.settle(recipe, deepspeed_json(recipe), directory, topology)
        if topology.device.type == "cuda" and topology.rank == 0:
            log.info("%s", attention_kernels.describe(torch.cuda.get_device_name(topology.device)))
        if recipe.task is None:
            run = pretraining.build(recipe, options, config, topology, directory)
        else:
            run = finetuning.build(recipe, options, config, topology, directory, encoder)
        code = supervise(run, stop_flag)
    except Exception as error:
        code = failed(error, directory, rank)
        end(run, code)
        run_lock.release()
        # Peers may still wait in a collective that this rank will never join: leave without saying goodbye.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    groups.shutdown()
    end(run, code)
    run_lock.release()
    return code


def end(run: "AnyRun[Any] | None", code: int) -> None:
    """The attempt's last line in its timeline, where it has one."""
    if run is not None and run.tracker.timeline is not None:
        run.tracker.timeline.end(code)


def configure(recipe: Recipe) -> dict[str, Any]:
    """Check the recipe against itself, the world size and the DeepSpeed JSON; returns DeepSpeed's configuration, with
    the precision that is usual where it is `auto`.

    Raises ConfigError before any process group is formed.
    """
    world_size = launchers.world_size()
    check_complete(recipe)
    recipe.check(world_size)
    recipe.data.check(recipe.model.modalities)
    raw = deepspeed_json(recipe)
    remarks = ds_config.remarks(raw, recipe.optim, len(recipe.model.modalities), recipe.accumulation)
    auto = legal.usual_precision("cuda" if _has_gpu() else "cpu")
    config = legal.deepspeed_config(recipe, raw, world_size, auto=auto)
    for line in remarks:
        log.info("%s", line)
    return config


def deepspeed_json(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed JSON that the recipe names, or what stands for none."""
    return ds_config.read(recipe.deepspeed_config) if recipe.deepspeed_config else DEFAULT_DEEPSPEED


def _has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    if not rank_environment.may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


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
