"""A checkpoint whose stems were parts of paired samples, as other formats have to see it: one stem without others.

The vector that a stem adds to its features is a constant behind a bias, and goes into it: the same features, exactly.
"""

import dataclasses
from typing import Any, cast

from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.huggingface import row_of
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import parts_of
from d2v_scale.recipe import Recipe


def without_pairs(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Checkpoint, Recipe]:
    """The checkpoint and its recipe, for formats that know single stems alone; unchanged where no stem is paired."""
    paired = {name: stem for name, stem in recipe.model.stems.items() if stem.paired}
    if not paired:
        return checkpoint, recipe
    biases = {
        f"stems.{name}.{modalities.of(recipe.model, name).feature_bias}": f"stems.{name}.features.modality"
        for name in paired
    }
    model = dataclasses.replace(
        recipe.model,
        **recipe.model.fields_of(
            {
                name: dataclasses.replace(stem, paired=False) if name in paired else stem
                for name, stem in recipe.model.stems.items()
            }
        ),
    )
    return cast(Checkpoint, _Folded(checkpoint, biases)), dataclasses.replace(recipe, model=model)


def require_one_input(model: ModelConfig, sequence: str, to: str) -> None:
    """Raises CheckpointError for what formats of one input do not hold: a sequence of several stems, and in an ONNX
    graph what only the modelling file of such sequences computes."""
    several = len(parts_of(sequence)) > 1
    if several or (to == "onnx" and row_of(model, sequence).names_are_ours):
        why = "has several inputs" if several else "is computed by the modelling file of several inputs alone"
        raise CheckpointError(
            f"An encoder of {sequence} {why}, which --to {to} has no form of.",
            "Export it with --to hf or safetensors" + (", or one stem with --modality." if several else "."),
        )


class _Folded:
    """Reads tensors of a checkpoint with these vectors (by the bias that each goes into) added to biases."""

    def __init__(self, checkpoint: Checkpoint, biases: dict[str, str]) -> None:
        self._checkpoint, self._biases = checkpoint, biases

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def names(self, kind: str) -> list[str]:
        """All but what only paired samples need."""
        vectors = set(self._biases.values())
        return [name for name in self._checkpoint.names(kind) if name not in vectors and ".hidden." not in name]

    def tensor(self, kind: str, name: str) -> Tensor:
        """The tensor in fp32."""
        tensor = self._checkpoint.tensor(kind, name)
        vector = self._biases.get(name)
        return tensor if vector is None else tensor + self._checkpoint.tensor(kind, vector)
