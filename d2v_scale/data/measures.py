"""What decides whether a sample can be read: one function per content, for converters, indexes, checks and training."""

from pathlib import Path

from d2v_scale import modalities
from d2v_scale.data.config import VisionData
from d2v_scale.data.shard_index import Measure
from d2v_scale.model.config import Modality


def measure_of(modality: Modality, tokenizer: Path | None = None, max_pixels: int = VisionData.max_pixels) -> Measure:
    """What gives the length of a sample of `modality`, from its members' bytes by extension: 16 kHz samples, tokens, 0
    of an image. It decodes what training decodes, and raises for what training would lose.

    `tokenizer`: the sentencepiece model of text, None where the shards hold ids. `max_pixels`: as
    data.vision.max_pixels of the recipe.
    """
    return modalities.class_of(modality).measure(tokenizer, max_pixels)
