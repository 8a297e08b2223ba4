"""`data.sources.*.modality` as a list of stems: how a recipe says that samples have several parts."""

from typing import Any

import yaml

from d2v_scale.errors import ConfigError
from d2v_scale.model.stem_config import sequence_of


def with_joined_names(values: Any) -> Any:
    """The values of a recipe, with every list of stems as the name of the sequence that they make. Raises ConfigError
    for a list that cannot be meant."""
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("sources"), list):
        return values
    return {**values, "data": {**data, "sources": _joined(data["sources"])}}


def join_source_lists(arguments: list[str]) -> list[str]:
    """Command-line arguments in which `--data.sources` says it likewise."""
    found: list[str] = []
    before = ""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if before == "--data.sources":
            argument = _in_text(argument)
        elif equals and key == "--data.sources":
            argument = f"{key}={_in_text(value)}"
        found.append(argument)
        before = argument
    return found


def _in_text(value: str) -> str:
    try:
        sources = yaml.safe_load(value)
    except yaml.YAMLError:  # the parser says it
        return value
    joined = _joined(sources) if isinstance(sources, list) else sources
    return value if joined == sources else yaml.safe_dump(joined, default_flow_style=True, width=1_000_000).strip()


def _joined(sources: list[Any]) -> list[Any]:
    found = []
    for number, source in enumerate(sources):
        names = source.get("modality") if isinstance(source, dict) else None
        if isinstance(names, list):
            if not names or not all(isinstance(name, str) and name for name in names):
                key = f"data.sources.{number}.modality"
                raise ConfigError(key, f"is {names!r}, no list of stems", "Give names, as [vision, text].")
            source = {**source, "modality": sequence_of(names)}
        found.append(source)
    return found
