"""Training from Python: `d2v train`, with keys as arguments and errors instead of exit codes."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from d2v_scale import command_line
from d2v_scale.answers import mistakes
from d2v_scale.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, ConfigError, TrainingEnded, UserError
from d2v_scale.parallel import local_ranks
from d2v_scale.process.started import STARTED
from d2v_scale.process.status import read_status
from d2v_scale.programs.own_program import TRAINING
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file
from d2v_scale.run_files.recipe_paths import find_data


def train(recipe: Recipe | str | PathLike[str] | None = None, *, ranks: int | None = None, **overrides: Any) -> Path:
    """Pretrain or fine-tune on this machine, in processes of its own, one for each GPU (one where there is none), and
    wait for the end; returns the run directory.

    `recipe`: the name of one of the package, a YAML file, or a `Recipe`; None: the vision demo, or with `resume` that
    of the run. `overrides` are keys of the recipe and the program's options, by nesting or by dotted names:
    `train("demo_vision", data="shards/*.tar", run_dir="runs/a", optim={"lr": 1e-3}, **{"model.backbone.depth": 6})`.

    Raises ConfigError before anything is started, UserError for other bad input (what `d2v train` ends with 2 for), and
    TrainingEnded, which has the exit code and the run directory, where the run was stopped or has failed. Signals reach
    the run (Ctrl-C saves and ends it), so call it in the main thread.
    """
    # Not when this process was started: a notebook may be open for days.
    environment = {**os.environ, STARTED: str(time.time())}
    if "RANK" in environment:
        raise UserError("train() is called in a process that a launcher has started.", "Start it by itself.")
    if threading.current_thread() is not threading.main_thread():
        raise UserError("train() is not called in the main thread, which gets the signals.", "Call it there.")
    count, gpus = local_ranks.choose_ranks(ranks, environment)
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory(prefix="d2v-recipe-") as folder:
        arguments = _arguments(recipe, overrides, Path(folder))
        found, options = command_line.parse(arguments)
        if not options.prepare:
            find_data(found, rank=0)
        run_dir = options.run_dir or options.resume
        if run_dir is None:
            utc = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            run_dir = str(command_line.default_run_dir(found, utc))
            arguments.append(f"--run_dir={run_dir}")
        command = [sys.executable, "-u", str(TRAINING), *arguments]
        code = local_ranks.run(command, count, environment, share_cores=gpus == 0)
    if code:
        raise _why(code, Path(run_dir))
    return Path(run_dir)


def _why(code: int, run_dir: Path) -> Exception:
    status = read_status(run_dir)
    told = status.reason if status is not None and status.exit_code == code else ""
    if code == EXIT_BAD_INPUT:
        return UserError(told or "The training program refused its input", "" if told else "It has said why above.")
    remedy = f" Go on with train(resume={str(run_dir)!r})." if code == EXIT_REQUEUE else f" See {run_dir / 'logs'}."
    return TrainingEnded(
        f"the run in {run_dir} ended with exit code {code}: {told or 'no reason is known'}.{remedy}", code, run_dir
    )


def _arguments(recipe: Recipe | str | PathLike[str] | None, overrides: Mapping[str, Any], folder: Path) -> list[str]:
    """The program's arguments. A `Recipe` becomes a file in `folder`."""
    arguments = []
    if isinstance(recipe, Recipe):
        path = folder / "recipe.yaml"
        path.write_text(recipe_file.dump(recipe), encoding="utf-8")
        arguments.append(f"--recipe={path}")
    elif isinstance(recipe, str | PathLike):
        arguments.append(f"--recipe={os.fspath(recipe)}")
    elif recipe is not None:
        raise ConfigError("recipe", f"is a {type(recipe).__name__}", "Give a name, a path or a Recipe.")
    for forbidden in ("recipe", "ranks", *command_line.ANSWERED):
        if forbidden in overrides:
            raise ConfigError(forbidden, "is not a key of a recipe")
    keys = mistakes.known_keys()
    return arguments + [f"--{key}={_text(value)}" for key, value in _flat(overrides, keys)]


def _flat(values: Mapping[str, Any], keys: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values: a mapping is divided where its key is a section."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in keys):
            yield from _flat(value, keys, f"{key}.")
        else:
            yield key, value


def _text(value: Any) -> str:
    """A value as the command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, str | PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float):
        return str(value).lower()
    return yaml.safe_dump(recipe_file.plain(value), default_flow_style=True, width=1_000_000).strip()
