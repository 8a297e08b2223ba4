"""The paths that a recipe names: made absolute before a run directory keeps them, so that a resumption in any folder
finds them."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2v_scale import templates
from d2v_scale.conversion import demo
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.recipe import Recipe
from d2v_scale.redaction import REDACTED
from d2v_scale.run_files.raw_data import shards_or_command
from d2v_scale.shards.patterns import expand, is_remote


def _places(recipe: Recipe) -> Iterator[tuple[Any, str]]:
    """Every section and its key that holds a path, a pattern of paths, or null."""
    for source in recipe.data.sources:
        yield from ((source, "shards"), (source, "index"))
    yield from ((recipe.data.text, "tokenizer"), (recipe.data, "cache_dir"), (recipe, "deepspeed_config"))
    yield (recipe.teacher, "checkpoint")
    for section in (recipe.evaluation, *recipe.evaluation.sets.values()):
        yield from ((section, name) for name in ("train", "test", "held_out"))


def make_absolute(recipe: Recipe, *, only_found: bool) -> None:
    """Put the working directory before every relative path in `recipe`, in place; before a pattern, too. `pipe:`
    commands and URLs stay as they are.

    `only_found`: leave what does not exist here. A resumed run may have been started in another folder, by a version
    that kept its paths as they were given.
    """
    for section, key in _places(recipe):
        path = getattr(section, key)
        if path and key == "deepspeed_config":
            path = str(templates.deepspeed_config(path))
        if path and not is_remote(path) and not (only_found and not _exists(path)):
            setattr(section, key, str(Path.cwd() / path))


def check_complete(recipe: Recipe) -> None:
    """Raises ConfigError where a path lacks the secret that it was given with: a run directory does not keep it."""
    for section, key in _places(recipe):
        if REDACTED in (getattr(section, key) or ""):
            given = "--data" if key in ("shards", "index") else f"--{_owner(recipe, section)}{key}"
            raise ConfigError(
                given.removeprefix("--"),
                f"is kept as {getattr(section, key)}, without its secret",
                f"Give {given} again, with the secret or with $NAME for an environment variable that holds it, which "
                "is kept.",
            )


def find_data(recipe: Recipe, rank: int) -> None:
    """Raises DataError where shards are missing, and for raw files, with the command that makes shards of them: on the
    first node alone, before anything slow is imported. On the others what is missing there is said when the run
    directory and its logs exist.

    The demo's shards are written later.
    """
    if rank >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return
    for source in recipe.data.sources:
        if demo.named_set(source.shards) is None:
            shards_or_command(source)


def _owner(recipe: Recipe, section: Any) -> str:
    named: dict[str, Any] = {"data.text.": recipe.data.text, "data.": recipe.data, "evaluation.": recipe.evaluation}
    named["teacher."] = recipe.teacher
    named |= {f"evaluation.sets.{stem}.": one for stem, one in recipe.evaluation.sets.items()}
    return next((name for name, one in named.items() if one is section), "")


def absolute(recipe: Recipe) -> Recipe:
    """A copy of `recipe` with `make_absolute`'s paths."""
    data = dataclasses.replace(recipe.data, text=dataclasses.replace(recipe.data.text))
    data.sources = [dataclasses.replace(source) for source in data.sources]
    sets = {stem: dataclasses.replace(one) for stem, one in recipe.evaluation.sets.items()}
    teacher, evaluation = dataclasses.replace(recipe.teacher), dataclasses.replace(recipe.evaluation, sets=sets)
    copy = dataclasses.replace(recipe, data=data, teacher=teacher, evaluation=evaluation)
    make_absolute(copy, only_found=False)
    return copy


def _exists(path: str) -> bool:
    try:
        return Path(path).exists() or bool(expand(path))
    except (OSError, ValueError, UserError):
        return False
