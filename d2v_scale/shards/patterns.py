"""From a pattern to the paths of shards that it names."""

import glob
import os
from collections import Counter

import braceexpand

from d2v_scale.errors import DataError
from d2v_scale.shards.shard_index import real_place


def is_remote(path: str) -> bool:
    """True for a `pipe:` command or a URL."""
    return path.startswith("pipe:") or "://" in path


def expand(pattern: str) -> list[str]:
    """The shards that a pattern names: braces, globs or both, or a directory. Raises DataError where one is missing or
    named twice.

    What is there under the very name is meant by it, whatever brackets or braces it holds; so is a folder in a path.
    """
    if is_remote(pattern):
        return _none_twice(braces(pattern), pattern)
    if os.path.isdir(pattern):
        paths = found_by("*.tar", pattern)
    else:
        paths = _none_twice(braces(pattern), pattern)
        paths = [path for name in paths for path in (found_by(name) if is_glob(name) else [name])]
        # What several globs find is meant once.
        paths = list({real_place(path): path for path in reversed(paths)}.values())[::-1]
    if not paths:
        raise DataError(f"No shard matches {pattern!r}.", "Check the path, or write shards with `d2v shards`.")
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(paths)} shards of {pattern!r} do not exist, the first is {absent[0]}.",
            "Correct the range, or restore the shards.",
        )
    return paths


def require_one(pattern: str) -> None:
    """Raises DataError where a pattern is several paths that are there, separated by commas."""
    pieces = pattern.split(",")
    if len(pieces) == 1 or is_remote(pattern) or os.path.lexists(pattern):
        return
    if all(os.path.lexists(piece) or found_by(piece) for piece in pieces):
        of_files = not any(os.path.isdir(piece) or piece.endswith(".json") for piece in pieces)
        remedy = f"Write '{{{pattern}}}'." if of_files else "A source is one set: name each set in data.sources."
        raise DataError(f"{pattern!r} names {len(pieces)} paths, separated by commas.", remedy)


def braces(pattern: str) -> list[str]:
    """What a pattern's braces stand for. Raises DataError for one without its other half."""
    if not is_remote(pattern) and os.path.lexists(pattern):
        return [pattern]
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"The pattern {pattern!r} has a brace too many: {error}.", "Correct it.") from error


def _none_twice(names: list[str], pattern: str) -> list[str]:
    counts = Counter(name if is_remote(name) else real_place(name) for name in names if not glob.has_magic(name))
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{pattern!r} names {twice[0]} twice.", "Name every shard once.")
    return names


def is_glob(name: str) -> bool:
    return glob.has_magic(name) and not os.path.lexists(name)


def found_by(pattern: str, folder: str = "") -> list[str]:
    """What a glob finds below `folder`, sorted; parts of the path that are there under the very name are no glob."""
    found = [folder or ("/" if os.path.isabs(pattern) else "")]
    for part in filter(None, pattern.split("/")):
        found = [os.path.join(path, name) for path in found for name in _names(path, part)]
    return sorted(found)


def _names(folder: str, part: str) -> list[str]:
    if not glob.has_magic(part) or os.path.lexists(os.path.join(folder, part)):
        return [part] if os.path.lexists(os.path.join(folder, part)) else []
    return glob.glob(part, root_dir=folder or None)
