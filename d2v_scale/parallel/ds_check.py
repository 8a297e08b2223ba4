"""Checks a DeepSpeed JSON key by key against the tables of `ds_keys`."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.ds_keys import (
    CHOICES,
    INERT,
    LEAVES,
    OFFLOADS,
    ONLY_REPORTS,
    PROVEN,
    RECIPES,
    REFUSED,
    SECOND_NAMES,
    SECTIONS,
)
from d2v_scale.parallel.ds_values import SWITCH, Kind, or_null, same

_KINDS: dict[str, Kind] = {**PROVEN, **RECIPES, **{key: kind for key, (kind, _) in INERT.items()}}


def accepted(raw: dict[str, Any]) -> dict[str, Any]:
    """What a DeepSpeed JSON says, in one spelling: without `auto`, without what changes nothing by being said.

    Raises ConfigError with the key's path and the remedy for a key that is refused or unknown, and for a value of a
    wrong kind.
    """
    return _accepted(raw, "")


def without_effect(said: dict[str, Any]) -> str | None:
    """One line that names what the JSON switches on and what does nothing here, with the reasons; None without any."""
    keys_by_reason: dict[str, list[str]] = {}
    for key, value in _leaves(said, ""):
        reason = INERT[key][1] if key in INERT else ONLY_REPORTS
        # What only reports does report. fp16 is refused when it is on.
        if value not in (False, None) and reason != ONLY_REPORTS and not key.startswith("fp16."):
            keys_by_reason.setdefault(reason, []).append(key)
    if not keys_by_reason:
        return None
    parts = (f"{', '.join(keys)} ({reason})" for reason, keys in keys_by_reason.items())
    return f"Without effect in the DeepSpeed JSON: {'; '.join(parts)}"


def _leaves(section: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def _accepted(section: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    old_switches: dict[str, bool | None] = {}
    for name, value in section.items():
        key = path + name
        if key in SECOND_NAMES:
            value = _value(key, value, _KINDS[SECOND_NAMES[key]])
            _put(found, SECOND_NAMES[key].removeprefix(path), value, key)
        elif key in OFFLOADS:
            old_switches[key] = _value(key, value, or_null(SWITCH))
        elif key in REFUSED:
            _refuse(key, value)
        elif key in SECTIONS:
            _put(found, name, _section(key, value), key)
        elif key in _KINDS:
            _put(found, name, _value(key, value, _KINDS[key]), key)
        else:
            raise _unknown(key, path)
    for key, on in old_switches.items():
        _switch(found, OFFLOADS[key].removeprefix(path), on, key)
    return found


def _switch(found: dict[str, Any], name: str, on: bool | None, key: str) -> None:
    """An old switch for an offload section: it may stand beside one that says the same."""
    if on and name not in found:
        found[name] = {"device": "cpu"}
    device = found.get(name, {}).get("device", "none")
    if on is not None and on != (device != "none"):
        raise ConfigError(key, f"is {json_words(on)}, but {name}.device is {device!r}", f"Leave {key} out.")


def _put(found: dict[str, Any], name: str, value: Any, key: str) -> None:
    if value is None:
        return
    if name in found and not same(found[name], value):
        raise ConfigError(key, f"is another name for {name}, which the DeepSpeed JSON has, too", f"Leave {key} out.")
    found[name] = value


def _section(key: str, value: Any) -> dict[str, Any] | None:
    if value is None and key in OFFLOADS.values():
        return None  # DeepSpeed's own word for none.
    if not isinstance(value, dict):
        said = f"is {json_words(value)} in the DeepSpeed JSON"
        raise ConfigError(key, said, "Give an object ({...}), or leave the key out.")
    return _accepted(value, f"{key}.")


def _value(key: str, value: Any, kind: Kind) -> Any:
    """The value; None where it says nothing."""
    if value == "auto" and key not in CHOICES:
        return None
    if not kind.holds(value):
        leave = "" if key in CHOICES else ", or leave the key out"
        raise ConfigError(key, f"is {json_words(value)} in the DeepSpeed JSON", f"Give {kind.says}{leave}.")
    return value


def _refuse(key: str, value: Any) -> None:
    neutral, reason = REFUSED[key]
    switched_off = isinstance(value, dict) and value.get("enabled") is False
    if value == "auto" or switched_off or any(same(value, each) for each in neutral):
        return
    written = [json_words(each) for each in neutral if each is not None]
    remedy = f"Set {written[0]} or remove it." if written else "Remove it from the JSON."
    raise ConfigError(key, f"is {json_words(value)} in the DeepSpeed JSON; {reason}", remedy)


def _unknown(key: str, path: str) -> ConfigError:
    siblings = {other[len(path) :].split(".")[0] for other in LEAVES if other.startswith(path)}
    near = difflib.get_close_matches(key[len(path) :], sorted(siblings), n=1, cutoff=0.8)
    remedy = f"Did you mean {path + near[0]!r}?" if near else "Remove it from the JSON."
    return ConfigError(key, "is not a key of DeepSpeed's configuration that is known to be right here", remedy)


def json_words(value: Any) -> str:
    """As it stands in the JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
