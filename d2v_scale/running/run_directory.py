"""The directory that holds everything of a run, and who may use it."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from d2v_scale.command_line import Options, check_same_recipe, default_run_dir
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.files import write_whole
from d2v_scale.parallel.groups import Topology
from d2v_scale.process.status import begin
from d2v_scale.recipe import Recipe, differences, to_dict
from d2v_scale.redaction import RedactingFormatter, redact_values
from d2v_scale.run_files.recipe_file import dump, load, plain
from d2v_scale.run_files.recipe_paths import make_absolute
from d2v_scale.run_files.run_lock import lock
from d2v_scale.run_files.run_start import (
    DS_CONFIG_FILE,
    RECIPE_FILE,
    began_from_other_weights,
    check_same_start,
    forget_failed_start,
    may_begin_anew,
    note_start,
)

log = logging.getLogger(__name__)


def claim(recipe: Recipe, options: Options, ds_config: dict[str, Any], topology: Topology) -> Path:
    """Choose the run directory, make it if needed, and write the resolved configuration into it.

    Ranks that were started with different arguments are refused: they are several runs, started as one world.
    A directory with the same recipe continues that run; with another recipe it is refused on every rank (ConfigError),
    and so is one that another program trains in (UserError).
    The paths in `recipe` become absolute, so that a resumption in another folder finds them.
    A change that `--allow_recipe_change` permits is recorded in recipe_changes.jsonl. Collective: all ranks must call.
    """
    if topology.world_size > 1:
        _check_same_arguments(recipe, options, topology)
    make_absolute(recipe, only_found=options.resume is not None)
    answer: list[Any] = [None, None]
    if topology.rank == 0:
        utc = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        run_dir = Path(options.run_dir or options.resume or default_run_dir(recipe, utc))
        answer = [str(run_dir), _problem(run_dir, recipe, options, ds_config)]
    if topology.world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    name, problem = answer
    if problem is not None:
        raise problem
    return Path(name)


def _check_same_arguments(recipe: Recipe, options: Options, topology: Topology) -> None:
    mine = {**to_dict(recipe), "run_dir": options.run_dir, "resume": options.resume, "stop_at": options.stop_at}
    everyone: list[dict[str, Any]] = [{}] * topology.world_size
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            changed = differences(everyone[0], theirs)
            key, (first, other) = next(iter(changed.items()))
            raise ConfigError(
                key,
                f"is {other!r} for rank {rank} and {first!r} for rank 0 of the same world",
                "Give all processes the same arguments; to train several runs side by side, start each task with "
                "RANK=0 WORLD_SIZE=1.",
            )


def _problem(run_dir: Path, recipe: Recipe, options: Options, ds_config: dict[str, Any]) -> UserError | None:
    """Write the configuration; what went wrong is returned, so that every rank can raise it."""
    try:
        _check(run_dir, recipe, options)
        run_dir.mkdir(parents=True, exist_ok=True)
        lock(run_dir)
        _check(run_dir, recipe, options)  # who had the lock until now may have begun to train
        changed = _changed(run_dir, recipe)
        if (changed or began_from_other_weights(run_dir, options)) and may_begin_anew(run_dir):
            forget_failed_start(run_dir)
            changed = {}
        _write(run_dir, recipe, ds_config, changed)
        note_start(run_dir, options)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"The run directory {run_dir} cannot be written: {error}.", "Choose another --run_dir.")
    return None


def _check(run_dir: Path, recipe: Recipe, options: Options) -> None:
    check_same_recipe(recipe, run_dir, options.allow_recipe_change)
    check_same_start(run_dir, options)


def _changed(run_dir: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The keys that differ from the recipe that `run_dir` holds; none where it holds none."""
    existing = run_dir / RECIPE_FILE
    return differences(load(existing), plain(to_dict(recipe))) if existing.is_file() else {}


def _write(run_dir: Path, recipe: Recipe, ds_config: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> None:
    for folder in ("checkpoints", "logs", "plots"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    begin(run_dir)
    if changed:
        record = {"time": time.time(), "changed": {k: {"from": a, "to": b} for k, (a, b) in changed.items()}}
        with (run_dir / "recipe_changes.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    write_deepspeed(run_dir, ds_config)
    write_whole(run_dir / RECIPE_FILE, dump(recipe))


def write_deepspeed(run_dir: Path, ds_config: dict[str, Any]) -> None:
    """Keep DeepSpeed's configuration as it is used."""
    write_whole(run_dir / DS_CONFIG_FILE, json.dumps(redact_values(ds_config), indent=2) + "\n")


def log_to_file(run_dir: Path, rank: int) -> None:
    """Keep this rank's log lines in `logs/rank-<rank>.log`, beside what rank 0 shows at the terminal."""
    handler = logging.FileHandler(run_dir / "logs" / f"rank-{rank:05d}.log")
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("d2v_scale")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
