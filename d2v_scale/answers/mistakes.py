"""What is wrong with a recipe or its overrides: the parser's complaint in words, with the key and its remedy."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from d2v_scale.answers import other_names
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file
from d2v_scale.run_files.value_kinds import in_words


def known_keys(owner: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class, `*` for a name of the user's own."""
    keys = []
    for name, kind in typing.get_type_hints(owner).items():
        if name.isupper() or typing.get_origin(kind) is typing.ClassVar:
            continue
        keys.append(f"{prefix}{name}")
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                keys += known_keys(option, f"{prefix}{name}.")
            inner = typing.get_args(option)[1] if typing.get_origin(option) is dict else None
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                keys += known_keys(inner, f"{prefix}{name}.*.")
    return keys


def explain(message: str, options: Mapping[str, Any]) -> NoReturn:
    """Turn the parser's complaint into a ConfigError that names the key and what would be right. `options`: what the
    command line takes beside keys of a recipe, with the type of each."""
    given = _unknown_key(message)
    if given is not None:
        raise ConfigError(_first_wrong(given, options), "is not a key of a recipe", nearest(given, options))
    key = _place(message)
    if key:
        raise ConfigError(key, *_mismatch(message, key, recipe_file.kind_at(key) or options.get(key)))
    raise ConfigError("recipe" if "config" in message else "command line", _one_paragraph(message))


def nearest(unknown: str, options: Iterable[str] = ()) -> str:
    """What may have been meant by a key that there is not: another program's name of it, a key that ends like it, or
    one that is written like it."""
    section, _, wrong = _first_wrong(unknown, options).rpartition(".")
    fields = _fields_of_items(section)
    if fields and wrong.isdigit():
        return f"A list is given whole: --{section} '[{{{fields[0]}: ...}}]'."
    valid = [*known_keys(), *options, *(f"{section}.{name}" for name in fields)]
    alike = difflib.get_close_matches(unknown, valid, n=1, cutoff=0.9)
    last = unknown.rpartition(".")[2].replace("-", "_")
    ends_alike = _ending_in(last, valid, unknown)
    elsewhere = None if section and ends_alike else other_names.answer(unknown)
    if elsewhere is not None:
        there_is = [key for key in ends_alike[:1] if f"{key!r}" not in elsewhere]
        return elsewhere + "".join(f" There is {key!r}, too." for key in there_is)
    if alike:
        return f"Did you mean {alike[0]!r}?"
    if ends_alike:
        return f"Did you mean {' or '.join(repr(key) for key in ends_alike[:2])}?"
    near = difflib.get_close_matches(unknown, valid, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else "See --help_all for all keys."


def _ending_in(last: str, valid: Iterable[str], unknown: str) -> list[str]:
    """The keys with this last part, the most similar to `unknown` first: those of pretraining before those of a task,
    and without what a single stem may have of its own where there is one for all."""
    found = [key for key in valid if key.rpartition(".")[2] == last and "*" not in key]
    for_all = [key for key in found if not any(_is_own(key, other) for other in found)]
    ratio = {key: difflib.SequenceMatcher(None, unknown, key).ratio() for key in for_all}
    return sorted(for_all, key=lambda key: (key.startswith("task.") and not unknown.startswith("task"), -ratio[key]))


def _is_own(key: str, of_all: str) -> bool:
    """Whether `key` is `of_all` with the name of a stem after its section."""
    section, _, rest = of_all.partition(".")
    return re.fullmatch(rf"{re.escape(section)}\.\w+\.{re.escape(rest)}", key) is not None


def _fields_of_items(key: str) -> list[str]:
    """The keys of each item, where `key` is a list of sections."""
    kind = recipe_file.kind_at(key)
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        [item, *_] = typing.get_args(option) or (None,)
        if typing.get_origin(option) is list and dataclasses.is_dataclass(item):
            return [field.name for field in dataclasses.fields(item)]
    return []


def _place(message: str) -> str:
    """The dotted key that the parser complains of: it names a section, then what is below it. Empty: it names none."""
    place = ""
    for name in re.findall(r'Parser key "([^"]+)"', message):
        place = _joined(place, name)
    return place


def _joined(place: str, name: str) -> str:
    if place.endswith(f".{name}"):  # said twice
        return place
    return name if not place or f"{name}.".startswith(f"{place}.") else f"{place}.{name}"


def _unknown_key(message: str) -> str | None:
    """The dotted path that the parser does not take, as it was given; None: it complains of something else."""
    place = _place(message)
    if found := re.search(r"unrecognized arguments: -*([\w.-]+)", message):
        return _joined(place, found.group(1))
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _joined(place, f"{found.group(1)}.{found.group(2)}")
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _joined(place, found.group(1))
    return None


def _first_wrong(path: str, options: Iterable[str]) -> str:
    """The shortest part of a dotted path that is no key: the parser names the leaf below it."""
    keys = {*known_keys(), *options}
    starts = [path[: match.start()] for match in re.finditer(r"\.|$", path)]
    return next((start for start in starts if start not in keys), path)


def _mismatch(message: str, key: str, kind: Any) -> tuple[str, str]:
    """What is wrong with a value of a key of that type, and what would be right: of the innermost complaint."""
    if found := re.search(r'Unable to load config "([^"\n]*)"', message):
        [inner, *_] = [*map(str, _keys_below(key)), "KEY"]
        return f"does not take {found[1]!r}, as it is a section", f"Give its keys, such as --{inner}."
    found = re.search(r"(?:Got|Given) value: ([^\n]*)|Expected a dot import path string: ([^\n]*)", message)
    if found is None or kind is None:
        return _one_paragraph(message), ""
    value = found[1] or found[2]
    return f"is {'null' if value == 'None' else value}", f"Give {in_words(kind)}."


def _keys_below(key: str) -> list[str]:
    """The keys directly below a section, in their order."""
    return [known for known in known_keys() if re.fullmatch(re.escape(key) + r"\.\w+", known)]


def _one_paragraph(message: str) -> str:
    text = re.sub(r'Parser key "[^"]+":', "", message)
    return re.sub(r"\s+", " ", text).strip()
