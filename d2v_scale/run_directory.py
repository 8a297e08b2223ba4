"""The directory that holds everything of a run, and who may use it."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from d2v_scale.command_line import (
    RECIPE_FILE,
    Options,
    check_same_recipe,
    default_run_dir,
    dump,
    load_recipe,
)
from d2v_scale.errors import UserError
from d2v_scale.parallel.groups import Topology
from d2v_scale.recipe import Recipe, differences, to_dict
from d2v_scale.status import begin


def claim(recipe: Recipe, options: Options, ds_config: dict[str, Any], topology: Topology) -> Path:
    """Choose the run directory, make it if needed, and write the resolved configuration into it.

    A directory with the same recipe continues that run; with another recipe it is refused on every rank (ConfigError).
    A change that `--allow_recipe_change` permits is recorded in recipe_changes.jsonl. Collective: all ranks must call.
    """
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


def _problem(run_dir: Path, recipe: Recipe, options: Options, ds_config: dict[str, Any]) -> UserError | None:
    """Write the configuration; what went wrong is returned, so that every rank can raise it."""
    try:
        check_same_recipe(recipe, run_dir, options.allow_recipe_change)
        _write(run_dir, recipe, ds_config)
    except UserError as error:
        return error
    except OSError as error:
        return UserError(f"The run directory {run_dir} cannot be written: {error}.", "Choose another --run_dir.")
    return None


def _write(run_dir: Path, recipe: Recipe, ds_config: dict[str, Any]) -> None:
    for folder in ("checkpoints", "logs", "plots"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    begin(run_dir)
    existing = run_dir / RECIPE_FILE
    if existing.is_file():
        changed = differences(load_recipe(existing), json.loads(json.dumps(to_dict(recipe))))
        if changed:
            record = {"time": time.time(), "changed": {k: {"from": a, "to": b} for k, (a, b) in changed.items()}}
            with (run_dir / "recipe_changes.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
    existing.write_text(dump(recipe))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n")


def log_to_file(run_dir: Path, rank: int) -> None:
    """Keep this rank's log lines in `logs/rank-<rank>.log`, beside what rank 0 shows at the terminal."""
    handler = logging.FileHandler(run_dir / "logs" / f"rank-{rank:05d}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("d2v_scale")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
