"""The packaged recipes, a line each: what it is, and how large."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from d2v_scale.model.config import ModelConfig
from d2v_scale.planning.stages import encoder_weights
from d2v_scale.run_files import recipe_file


def listed(folder: Path) -> str:
    """The list of the recipes in `folder`: name, parameters of the encoder, and the first sentence of its file."""
    rows = [(path.stem, size(path), _about(path)) for path in sorted(folder.glob("*.yaml"))]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {weights:>{widths[1]}}  {about}" for name, weights, about in rows]
    last = "Parameters of the encoder, without predictor and teacher; `-`: it is the one of --init_from."
    return "\n".join([*lines, "", last])


def size(path: Path) -> str:
    """Parameters of the encoder of a recipe, to three digits: `313 M`; `-` where the recipe has no model."""
    model: ModelConfig = _built(ModelConfig, recipe_file.load(path)["model"])
    if not model.modalities:
        return "-"
    millions = encoder_weights(model) / 1e6
    if millions >= 999.5:
        return f"{millions / 1e3:.2f} B"
    return f"{millions:.0f} M" if millions >= 99.5 else f"{millions:.1f} M"


def _about(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = " ".join(line[1:].strip() for line in path.read_text().partition("\n\n")[0].splitlines())
    sentence = re.split(r"[.:;](?:\s|$)", comment)[0]
    return sentence if len(sentence) <= 90 else sentence[:87] + "..."


def _built(kind: Any, value: Any) -> Any:
    """What a section's type says, of plain values as a resolved recipe has them."""
    inner = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        return kind(**{name: _built(kinds[name], one) for name, one in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: _built(inner[1], one) for name, one in value.items()}
    sections = [one for one in inner if dataclasses.is_dataclass(one)]
    return _built(sections[0], value) if sections and isinstance(value, dict) else value
