"""recipe.yaml: written so that every value is read back as the same one, whatever a name or a path looks like.

`25921e05` is a number to one YAML reader and text to another; where a key may be null the parser takes `#1` for
nothing, and `_` ends it. So text that is no plain word is quoted, and goes through the parser with a mark before it.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from d2v_scale.data2vec.own import OwnTarget
from d2v_scale.data2vec.target_config import TargetConfig
from d2v_scale.errors import ConfigError
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.redaction import redact_values
from d2v_scale.run_files.paired_sources import with_joined_names
from d2v_scale.run_files.value_kinds import check_keys_once, check_kind, named_section, section_of

_NAMED = r"(model\.arrays|objective\.arrays|evaluation\.sets)"  # sections by names of the user's own
_MARK = "\ue000"  # of Unicode's private use area
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf", "infinity"}
"""What some reader takes for a value of another type."""


class _Dumper(yaml.SafeDumper):
    """Quotes all text but plain words."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("recipe", f"{text!a} holds bytes that are no UTF-8", "Rename the file or folder.")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if _is_plain(text) else '"')


_Dumper.add_representer(str, _represent_text)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `command_line.parse` reads back. Raises ConfigError for text that no YAML can hold."""
    return _dump(plain(to_dict(recipe)))


def _dump(values: Any) -> str:
    # One line a value: folding is one more thing that could go wrong.
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=1_000_000)


def plain(value: Any) -> Any:
    """Nested values without tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def load(path: Path) -> dict[str, Any]:
    """A resolved recipe from a run directory, as plain values: without secrets, which earlier versions kept, and with
    the defaults of keys that those did not have yet. Raises ConfigError when it cannot be read."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("run_dir", f"cannot read {path}: {error}", "Choose another --run_dir.") from error
    if not isinstance(value, dict):
        raise ConfigError("run_dir", f"{path} is not a recipe", "Choose another --run_dir.")
    return completed(redact_values(one_first_target(value)), Recipe)


def completed(values: dict[str, Any], owner: type) -> dict[str, Any]:
    """The values of a section, with the default of every key that is absent: what the parser takes them for, too."""
    found = dict(values)
    kinds = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        section, value = section_of(kinds[field.name]), found.get(field.name)
        if field.name in found and named_section(kinds[field.name]) is not None and isinstance(value, dict):
            assert section is not None
            found[field.name] = {k: completed(v, section) if isinstance(v, dict) else v for k, v in value.items()}
        elif field.name not in found:
            if field.default_factory is not dataclasses.MISSING:
                found[field.name] = _as_values(field.default_factory())
            elif field.default is not dataclasses.MISSING:
                found[field.name] = _as_values(field.default)
        elif section is not None and isinstance(value, dict):
            found[field.name] = completed(value, section)
        elif section is not None and isinstance(value, list):
            found[field.name] = [completed(item, section) if isinstance(item, dict) else item for item in value]
    return found


def _as_values(value: Any) -> Any:
    return plain(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)  # type: ignore[arg-type]


def one_first_target(values: Any) -> Any:
    """The values of a recipe, with a list of targets, as `objective.target` or a stem's own may be one, divided into
    the first (`target`) and the others (`further_targets`). Raises ConfigError for a list that cannot be meant."""
    objective = values.get("objective") if isinstance(values, dict) else None
    if not isinstance(objective, dict):
        return values
    parts = {k: _divided(v, f"objective.{k}") if isinstance(v, dict) else v for k, v in objective.items()}
    if isinstance(arrays := objective.get("arrays"), dict):
        named = {k: _divided(v, f"objective.arrays.{k}") if isinstance(v, dict) else v for k, v in arrays.items()}
        parts["arrays"] = named
    return {**values, "objective": _divided(parts, "objective")}


def _divided(section: dict[str, Any], key: str) -> dict[str, Any]:
    every = section.get("target")
    if not isinstance(every, list):
        return section
    if not every or not all(isinstance(one, dict) for one in every):
        raise ConfigError(
            f"{key}.target", f"is {every!r}, no list of targets", "Give each as {kind: ..., weight: ...}."
        )
    if section.get("further_targets"):
        raise ConfigError(f"{key}.further_targets", f"is set beside a list as {key}.target", "Put all into that list.")
    return {**section, "target": every[0], "further_targets": every[1:]}


def divide_target_lists(arguments: list[str]) -> list[str]:
    """Command-line arguments in which a list as `--objective.target`, or a stem's own, is divided likewise. As in a
    file, what its first entry does not say is default, whatever the recipe says."""
    divided: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.partition("=")
        if not re.fullmatch(r"--objective\.(\w+\.)?target", key):
            divided.append(argument)
            continue
        value = value if equals else next(rest, "")
        section = key.removeprefix("--").removesuffix(".target")
        owner = TargetConfig if section == "objective" else OwnTarget
        try:
            every = yaml.safe_load(value)
        except yaml.YAMLError:
            every = value
        if not isinstance(every, list):
            divided.append(f"{key}={value}")
            continue
        found = _divided({"target": every}, section)
        first = completed(found["target"], owner)
        divided += [
            f"{key}={_flow(first)}",
            f"{key.removesuffix('target')}further_targets={_flow(found['further_targets'])}",
        ]
    return divided


def _flow(values: Any) -> str:
    marked = _marked(values, list[TargetConfig] if isinstance(values, list) else TargetConfig)
    return yaml.safe_dump(marked, default_flow_style=True, width=1_000_000).strip()


def for_parser(path: Path, named: Mapping[str, Any] | None = None) -> str:
    """The content of a recipe's file in a form that leaves the parser nothing to guess; the path itself where only the
    parser can say what is wrong with it. `named`: what else is to be in it, by dotted keys (`take_named`). Raises
    ConfigError for keys below a name of the user's own that there are not, which the parser would not name."""
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return str(path)
    check_keys_once(text)
    if not isinstance(values, dict):
        return str(path)
    for key, value in (named or {}).items():
        _enter(values, key, value)
    values = with_joined_names(_without_empty_sections(values, Recipe))
    _check_named(values, Recipe, "")
    try:
        return _dump(_marked(one_first_target(values), Recipe))
    except (ValueError, yaml.YAMLError):
        return str(path)


def take_named(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Remove `--model.arrays.NAME.KEY VALUE` and what else is below a name of the user's own, which the parser does not
    divide, and `null` for what is deep below a section that may be null itself, which the parser takes for a word;
    return what they say, by dotted keys. Raises ConfigError for one without a value."""
    arguments, found = _take_nulls(arguments)
    rest: list[str] = []
    coming = iter(arguments)
    for argument in coming:
        key, equals, value = argument.partition("=")
        if not re.fullmatch(rf"--{_NAMED}(?!\.help$)(\.\w+)*", key):
            rest.append(argument)
            continue
        key = key.removeprefix("--")
        given = value if equals else next(coming, None)
        if given is None or (not equals and given.startswith("--")):
            raise ConfigError(key, "has no value", "Write --key VALUE.")
        try:
            found[key] = given if _is_text(kind_at(key)) and given != "null" else yaml.safe_load(given)
        except yaml.YAMLError:
            found[key] = given
    return rest, found


def _take_nulls(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    rest: list[str] = []
    found: dict[str, Any] = {}
    coming = iter(zip(arguments, [*arguments[1:], ""], strict=False))
    for argument, after in coming:
        option, equals, value = argument.partition("=")
        key = option.removeprefix("--")
        is_ours = re.fullmatch(rf"--(?!{_NAMED}\.)\w+(\.\w+)+", option)
        if not is_ours or (value if equals else after) != "null":
            rest.append(argument)
            continue
        kind = kind_at(key)
        if dataclasses.is_dataclass(kind) and not re.match(r"objective\.\w+\.", key):
            raise ConfigError(key, "is null, but it is a section", "Give its keys, or leave it out.")
        if kind is not None and not _may_be_null(kind):
            raise ConfigError(key, "is null", "Give a value, or leave it out.")
        if key.count(".") > 1 and kind is not None:
            found[key] = None
            while option in rest:  # what comes later counts
                del rest[rest.index(option) : rest.index(option) + 2]
            rest = [one for one in rest if not one.startswith(f"{option}=")]
            if not equals:
                next(coming)
        else:
            rest.append(argument)
    return rest, found


def kind_at(key: str) -> Any:
    """The type of the key, or None where there is no such."""
    kind: Any = Recipe
    for part in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            owner = section_of(kind)
            kind = typing.get_type_hints(owner).get(part) if owner is not None else None
    return kind


def _may_be_null(kind: Any) -> bool:
    """Whether null means something: that a value is not set, or that a section says nothing."""
    return types.NoneType in typing.get_args(kind) or dataclasses.is_dataclass(kind)


def _without_empty_sections(
    values: dict[str, Any], owner: type, prefix: str = "", *, below: bool = False
) -> dict[str, Any]:
    """Without sections that are null, as one is of which all lines are comments, where the parser expects some. Raises
    ConfigError for null where a value is needed; `below` a name of the user's own `_check_named` does."""
    kinds = typing.get_type_hints(owner)
    found = {}
    for name, value in values.items():
        kind = kinds.get(name)
        section, key = section_of(kind), f"{prefix}{name}"
        if value is None and dataclasses.is_dataclass(kind):
            continue
        if value is None and kind is not None and not _may_be_null(kind) and not below:
            raise ConfigError(key, "is null", "Give a value, or leave it out.")
        if section is None or not isinstance(value, dict):
            found[name] = value
        elif named_section(kind) is None:
            found[name] = _without_empty_sections(value, section, f"{key}.", below=below)
        else:
            found[name] = {
                called: _without_empty_sections(one, section, f"{key}.{called}.", below=True)
                if isinstance(one, dict)
                else one
                for called, one in value.items()
            }
    return found


def _enter(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested values, in place."""
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value


def _check_named(values: Any, owner: type, prefix: str, *, below: bool = False) -> None:
    """Raises ConfigError for the first key below a name of the user's own (`below`) that is none."""
    kinds = typing.get_type_hints(owner)
    fields = [field.name for field in dataclasses.fields(owner)]
    for name, value in values.items() if isinstance(values, dict) else ():
        if name not in fields:
            if not below:
                continue  # the parser says it
            near = difflib.get_close_matches(str(name), fields, n=1)
            remedy = f"Did you mean {prefix + near[0]!r}?" if near else f"There are {', '.join(fields)}."
            raise ConfigError(f"{prefix}{name}", "is not a key of a recipe", remedy)
        if below:
            check_kind(f"{prefix}{name}", value, kinds[name])
        section = section_of(kinds[name])
        is_word = below and section is not None and isinstance(value, (str, int, float))
        if is_word and typing.get_origin(kinds[name]) not in (list, dict):
            raise ConfigError(f"{prefix}{name}", f"is {value!r}, no section", "Give its keys and values.")
        if section is None or not isinstance(value, dict):
            continue
        if named_section(kinds[name]) is None:
            _check_named(value, section, f"{prefix}{name}.", below=below)
            continue
        for called, inner in value.items():
            if not isinstance(called, str):
                raise ConfigError(f"{prefix}{name}", f"has the name {called!r}, which is no text", "Use letters.")
            if not isinstance(inner, dict):
                raise ConfigError(f"{prefix}{name}.{called}", f"is {inner!r}, no section", "Give its keys and values.")
            _check_named(inner, section, f"{prefix}{name}.{called}.", below=True)


def mark_arguments(arguments: list[str], owners: tuple[type, ...]) -> list[str]:
    """Command-line arguments `--key VALUE` and `--key=VALUE` likewise. Where a key may be null, the word `null` is."""
    keys = {f"--{key}" for owner in owners for key in _text_keys(owner)}
    marked = []
    before = ""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if before in keys:
            marked.append(argument if argument == "null" else _mark(argument))
        elif equals and key in keys:
            marked.append(argument if value == "null" else f"{key}={_mark(value)}")
        else:
            marked.append(argument)
        before = argument
    return marked


def unmark(value: Any) -> Any:
    """The instances of configuration classes in `value` without marks, in place; returns `value`."""
    if isinstance(value, str):
        return value.removeprefix(_MARK)
    if isinstance(value, list):
        return [unmark(item) for item in value]
    if isinstance(value, dict):
        return {key: unmark(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            setattr(value, field.name, unmark(getattr(value, field.name)))
    return value


def _marked(value: Any, kind: Any) -> Any:
    """`value`, of a key of type `kind`, with marks before the text in which the parser might see something else."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str):
        return _mark(value) if _is_text(kind) else value
    for option in options:
        if isinstance(value, dict) and dataclasses.is_dataclass(option):
            kinds = typing.get_type_hints(option)
            return {key: _marked(item, kinds.get(key)) for key, item in value.items()}
        if isinstance(value, dict) and typing.get_origin(option) is dict:
            return {key: _marked(item, typing.get_args(option)[1]) for key, item in value.items()}
        if isinstance(value, list) and typing.get_origin(option) is list:
            return [_marked(item, typing.get_args(option)[0]) for item in value]
    return value


def _mark(text: str) -> str:
    return text if _is_plain(text) else _MARK + text


def _is_plain(text: str) -> bool:
    return _PLAIN.fullmatch(text) is not None and text.lower() not in _WORDS


def _is_text(kind: Any) -> bool:
    return kind is str or (isinstance(kind, types.UnionType) and set(typing.get_args(kind)) == {str, types.NoneType})


def _text_keys(owner: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(owner).items():
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if _is_text(kind):
            keys.append(prefix + name)
        for option in options:
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                keys += _text_keys(option, f"{prefix}{name}.")
    return keys
