"""From the command line and YAML to a checked recipe; every mistake names the key and what would be right."""

import argparse
import dataclasses
import difflib
import itertools
import os
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d2v_scale.answers import mistakes, stray_words
from d2v_scale.errors import ConfigError
from d2v_scale.optim import END_OF_DECAY, check_end_is_open
from d2v_scale.recipe import Recipe, binding_differences, differences, to_dict
from d2v_scale.run_files import recipe_file
from d2v_scale.run_files.committed import committed_steps
from d2v_scale.run_files.paired_sources import join_source_lists
from d2v_scale.run_files.recipe_file import plain
from d2v_scale.run_files.recipe_paths import absolute
from d2v_scale.run_files.run_start import RECIPE_FILE, began_from, may_begin_anew

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo_vision"

_EPILOG = """Recipes: a name from d2v_scale/recipes or a YAML file. Keys given after it override it, e.g.
`--recipe d2v2_vision_base --optim.lr 1e-3 --model.backbone.depth 24`. Without arguments: the vision demo.
`--data SHARDS` trains on other shards than the recipe's: a path with {000000..000099}, a glob, a directory or an
index (for several stems: `vision=SHARDS,speech=SHARDS`). `--print_config` shows the resolved recipe and ends;
`--model.vision.help` (and so on) explains an optional section."""


@dataclass(kw_only=True)
class Options:
    """How this invocation runs its recipe; none of it changes what the recipe computes."""

    run_dir: str | None = None
    """Directory of the run. Default: runs/<recipe>-<UTC time>, in a Slurm job runs/<job name>-<job id>."""
    resume: str | None = None
    """Continue the run in this directory with the recipe it was started with."""
    stop_at: int | None = None
    """End after this many steps, without changing the schedule."""
    init_from: str | None = None
    """Start a new run from the weights of this checkpoint or run directory; fine-tuning also of an exported folder."""
    reset_teacher: bool = False
    """With init_from: start the teacher as a copy of the student instead of from the checkpoint's teacher."""
    prepare: bool = False
    """Where --data names a folder of raw files: make shards of it beside the run, as `d2v shards` does, and go on."""
    allow_recipe_change: bool = False
    """Resume although keys that matter were changed; the change is recorded in the run directory."""


ANSWERED = ("help", "help_all", "list_recipes", "print_config")
"""What is answered instead of training."""
OPTIONS = {"recipe": str, **dict.fromkeys(ANSWERED), **typing.get_type_hints(Options)}
"""What the command line takes beside keys of a recipe, and its type."""


def parse(arguments: list[str]) -> tuple[Recipe, Options]:
    """The recipe and options that `arguments` describe. Raises ConfigError; what is `ANSWERED` exits."""
    _answer(arguments)
    arguments = _say_true(arguments)
    stray_words.refuse(arguments)
    shown = "--print_config" in arguments
    arguments, shards = _take_shards([a for a in arguments if a != "--print_config"])
    arguments, base = _take_recipe(arguments)
    arguments, named = recipe_file.take_named(arguments)
    parser = _make_parser()
    try:
        arguments = join_source_lists(recipe_file.divide_target_lists(arguments))
        arguments = recipe_file.mark_arguments(arguments, (Recipe, Options))
        values = parser.parse_args([f"--recipe={recipe_file.for_parser(base, named)}", *arguments])
        sections = parser.instantiate(values)
    except (argparse.ArgumentError, TypeError) as error:
        mistakes.explain(str(error), OPTIONS)
    except ConfigError:
        raise
    except ValueError as error:  # of the parser, too
        mistakes.explain(str(error), OPTIONS)
    options = recipe_file.unmark(Options(**{f.name: sections[f.name] for f in dataclasses.fields(Options)}))
    recipe = recipe_file.unmark(Recipe(**{f.name: sections[f.name] for f in dataclasses.fields(Recipe)}))
    if shards is not None:
        # What is fine-tuned from an encoder has the encoder's stems, not those that the recipe would have without.
        brought = recipe.task is not None and options.init_from is not None
        recipe.data.read_from(shards, [] if brought else recipe.model.modalities)
    recipe.enter_pairs()
    if shown:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(0)
        print(recipe_file.dump(recipe), end="")
        sys.exit(0)
    if options.stop_at is not None and options.stop_at < 0:
        raise ConfigError("stop_at", f"is {options.stop_at}", "Give a step of the run.")
    if options.reset_teacher and options.init_from is None:
        raise ConfigError("reset_teacher", "is true without --init_from", "Give both, or neither.")
    if options.resume is not None and options.init_from is None:
        options.init_from, options.reset_teacher = began_from(Path(options.resume))
    return recipe, options


def _say_true(arguments: list[str]) -> list[str]:
    """A switch without a value, as `--prepare`, is `--prepare=true`."""
    switches = {f"--{name}" for name, kind in typing.get_type_hints(Options).items() if kind is bool}
    return [
        f"{word}=true" if word in switches and after.startswith("--") else word
        for word, after in itertools.pairwise([*arguments, "--"])
    ]


def _answer(arguments: list[str]) -> None:
    """Where help is asked for, print it, once for all ranks, and exit."""
    asked = {name for name in ("-h", *(f"--{name}" for name in ANSWERED)) if name in arguments} - {"--print_config"}
    if not asked:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    if "--list_recipes" in asked:
        from d2v_scale.answers.recipe_list import listed

        print(listed(RECIPES))
    elif "--help_all" in asked:
        _make_parser().print_help()
    else:
        print(help_screen(arguments))
    sys.exit(0)


def help_screen(arguments: list[str], more: Iterable[tuple[str, str]] = ()) -> str:
    """What `--help` shows beside `arguments`, with `more` options of the program that was called. Raises
    ConfigError."""
    from d2v_scale.answers.help_screen import screen

    return screen(_take_recipe(arguments)[1], more)


@cache
def _make_parser() -> Any:
    """Made once a process: it reads the docstrings of every section from their files."""
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = "Pretrain a data2vec model, or fine-tune one."
    parser = ArgumentParser(prog="train.py", exit_on_error=False, description=about, epilog=_EPILOG)
    parser.add_argument("--recipe", action=ActionConfigFile, help="Name or YAML file of the recipe.")
    parser.add_class_arguments(Options)
    parser.add_class_arguments(Recipe)
    return parser


def _take_shards(arguments: list[str]) -> tuple[list[str], str | None]:
    """Remove `--data SHARDS`, which the parser would take for the whole `data` section, and what launchers add; write
    out `--decay_from`."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--data")
    finder.add_argument("--decay_from")
    finder.add_argument("--local_rank", "--local-rank")  # the environment says the same
    known, rest = finder.parse_known_args(arguments)
    if known.data is not None and not known.data.strip():  # of a shell's variable that is not set
        raise ConfigError("data", "is empty", "Name shards, or leave --data out.")
    if known.decay_from is not None:
        rest.append(f"--optim.decay_from={known.decay_from}")
    return rest, known.data


def _take_recipe(arguments: list[str]) -> tuple[list[str], Path]:
    """Remove `--recipe X`; return the YAML file that is the base, which for `--resume DIR` is the one in DIR."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    finder.add_argument("--resume")
    known, rest = finder.parse_known_args(arguments)
    if known.resume is None:
        return rest, find_recipe(known.recipe or DEFAULT_RECIPE)
    if known.recipe is not None:
        raise ConfigError("recipe", "was given together with --resume", "A resumed run has its recipe already.")
    base = Path(known.resume) / RECIPE_FILE
    if not base.is_file():
        raise ConfigError("resume", f"{base} does not exist", "Give the directory of a run, as --run_dir was.")
    return [*rest, f"--resume={known.resume}"], base


def find_recipe(name: str) -> Path:
    """The YAML file of a packaged recipe, or `name` itself as a path. Raises ConfigError with the nearest name."""
    for candidate in (RECIPES / f"{name}.yaml", Path(name)):
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Give a YAML file or one of: {', '.join(names)}."
    raise ConfigError("recipe", f"{name!r} is neither a recipe nor a file", hint)


def changed_from_named(recipe: Recipe) -> dict[str, str]:
    """Tags `recipe.<key>` for what differs from the recipe of that name in this package; none if there is no such."""
    if not (RECIPES / f"{recipe.name}.yaml").is_file():
        return {}
    named, _ = parse(["--recipe", recipe.name])
    changed = differences(plain(to_dict(absolute(named))), plain(to_dict(absolute(recipe))))
    return {f"recipe.{key}": f"{old} -> {new}" for key, (old, new) in changed.items()}


def check_same_recipe(recipe: Recipe, run_dir: Path, allow_change: bool) -> None:
    """Raises ConfigError when `run_dir` holds a run of another recipe that has taken a step, naming the first keys
    that differ."""
    existing = run_dir / RECIPE_FILE
    if allow_change or not existing.is_file() or may_begin_anew(run_dir):
        return
    changed = binding_differences(recipe_file.load(existing), plain(to_dict(recipe)))
    # A run directory of an earlier version has its paths as they were given.
    changed = {name: (old, new) for name, (old, new) in changed.items() if not _same_file(old, new)}
    if changed.keys() & {*END_OF_DECAY}:
        step = max(committed_steps(run_dir / "checkpoints"), default=0)
        if check_end_is_open(recipe_file.load(existing)["optim"], plain(to_dict(recipe))["optim"], step):
            changed = {name: values for name, values in changed.items() if name not in END_OF_DECAY}
    if changed:
        shown = "; ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in list(changed.items())[:5])
        raise ConfigError(
            "run_dir",
            f"{run_dir} holds a run of another recipe ({shown})",
            "Choose another --run_dir, or continue that run with --resume (--allow_recipe_change to change it).",
        )


def _same_file(old: Any, new: Any) -> bool:
    return isinstance(old, str) and isinstance(new, str) and os.path.isfile(old) and str(Path.cwd() / old) == new


def default_run_dir(recipe: Recipe, utc: str) -> Path:
    """`runs/<recipe>-<UTC time>`, or `runs/<job name>-<job id>` in a Slurm job (the same after a requeue)."""
    job, job_id = os.environ.get("SLURM_JOB_NAME"), os.environ.get("SLURM_JOB_ID")
    return Path("runs") / (f"{job}-{job_id}" if job and job_id else f"{recipe.name}-{utc}")
