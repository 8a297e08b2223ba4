"""What is measured: published recipes cut down to a size for a CPU, and synthetic batches for any recipe."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from d2v_scale import command_line, modalities
from d2v_scale.batch import Batch
from d2v_scale.data2vec import masking
from d2v_scale.errors import UserError
from d2v_scale.recipe import Recipe

_SPEECH = ("width=256", "heads=4", "ffn=1024", "depth=6", "layer_drop=0")
_OTHER = ("width=384", "heads=6", "ffn=1536", "layer_drop=0")


@dataclass(frozen=True)
class Case:
    """One recipe at one batch size."""

    name: str
    recipe: Recipe
    samples: int
    """Samples of one step."""
    length: int
    """Audio samples or tokens of each; an image has the recipe's size."""

    @property
    def modality(self) -> str:
        """The recipe's only modality."""
        return self.recipe.model.modalities[0]

    def batch(self, step: int = 0, *, padded: bool = False) -> Batch:
        """A batch of noise with the recipe's masks, the same for the same `step`. On the CPU.

        `padded`: its samples are 60 to 100 % as long, evenly spread. Only of those that are waveforms.
        """
        model, modality = self.recipe.model, self.modality
        generator = torch.Generator().manual_seed(step)
        sample_ids = np.arange(self.samples) + step * self.samples
        stem = modalities.of(model, modality)
        _, grid = stem.extent(self.recipe.data, self.length)
        inputs = stem.noise(self.samples, self.length, generator)
        valid: torch.Tensor | None = None
        valid_lengths: list[int] | None = None
        if padded:
            assert inputs.is_floating_point(), "only waveforms are padded here"
            real_b = torch.linspace(0.6, 1.0, self.samples).mul(self.length).long()
            valid = torch.arange(self.length)[None] < real_b[:, None]
            inputs = inputs * valid
            valid_lengths = [math.prod(stem.extent(self.recipe.data, real)[1]) for real in real_b.tolist()]
        masks = masking.collate(
            self.recipe.masking_of(modality),
            grid=grid,
            sample_ids=sample_ids,
            valid_lengths=valid_lengths,
            seed=1,
            step=step,
            equal_counts=model.visible_only,
        )
        masked_rt = torch.from_numpy(masks.masked_rt)
        return Batch(
            modality=modality,
            inputs=inputs,
            valid=valid,
            masked_rt=masked_rt,
            student_inputs=stem.student_inputs(inputs, masks),
            sample_ids=torch.from_numpy(sample_ids),
            grid=grid if len(grid) > 1 else (),
            extra_tokens=stem.extra_tokens,
        )


def _small(recipe: str, backbone: tuple[str, ...], *options: str) -> list[str]:
    return ["--recipe", recipe, *(f"--model.backbone.{one}" for one in backbone), *(f"--{one}" for one in options)]


_TOP_3, _TOP_4, _TOP_5, _TOP_6 = (f"objective.target.top_k_layers={k}" for k in (3, 4, 5, 6))

# Command line, samples of a step, length of a sample. The 2.0 base decoders are published at width 384 or 768.
_CASES: dict[str, tuple[list[str], int, int]] = {
    "v1_speech": (_small("d2v1_speech_base", _SPEECH, _TOP_4), 4, 80_000),
    "v1_vision": (
        _small("d2v1_vision_base", (*_OTHER, "depth=6", "drop_path=0.1", "attention_dropout=0"), _TOP_3),
        8,
        0,
    ),
    "v1_text": (_small("d2v1_text_base", (*_OTHER, "depth=6"), _TOP_5), 8, 256),
    "v2_speech": (_small("d2v2_speech_base", _SPEECH, _TOP_4, "model.predictor.width=128"), 4, 80_000),
    "v2_vision": (
        _small(
            "d2v2_vision_base",
            (*_OTHER, "depth=4", "prenet_depth=2", "drop_path=0"),
            _TOP_4,
            "model.predictor.width=384",
        ),
        8,
        0,
    ),
    "v2_text": (
        _small("d2v2_text_base", (*_OTHER, "depth=6", "prenet_depth=0"), _TOP_6, "model.predictor.width=384"),
        8,
        256,
    ),
}

NAMES = tuple(_CASES)


def case(name: str, samples: int | None = None, length: int | None = None, options: tuple[str, ...] = ()) -> Case:
    """A case of `NAMES`, or any recipe by name or path. `options`: further recipe options.

    `samples` defaults to 8 and `length` to 5 s of sound or 512 tokens for a recipe that is not of `NAMES`. Raises
    UserError for a recipe that does not exist or has several modalities.
    """
    arguments, its_samples, its_length = _CASES.get(name, (["--recipe", name], 8, 0))
    recipe, _ = command_line.parse([*arguments, *options])
    if len(recipe.model.modalities) != 1:
        raise UserError(f"{name} has several modalities.", "Name a recipe of one.")
    [stem] = modalities.stems(recipe.model)
    return Case(name, recipe, samples or its_samples, length or its_length or stem.usual_size)
