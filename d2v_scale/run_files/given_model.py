"""What a command asks of a model that is another encoder's."""

import dataclasses
from typing import Any

from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import differences


def asked_otherwise(given: ModelConfig, usual: ModelConfig, actual: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """The keys below `model.` that the user changed from the `usual` model and that the encoder's `actual` model has
    otherwise, each with the given and the actual value."""
    values = dataclasses.asdict(given)
    asked = differences(dataclasses.asdict(usual), values)
    return {
        name: pair
        for name, pair in differences(values, dataclasses.asdict(actual)).items()
        if any(name == key or name.startswith(f"{key}.") for key in asked)
    }
