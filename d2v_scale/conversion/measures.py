"""What decides whether a sample can be read: one function per content, for converters, indexes, checks and training."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

from d2v_scale.data.config import VisionData
from d2v_scale.shards.content import Content
from d2v_scale.shards.one_content import hidden_beside
from d2v_scale.shards.shard_index import Measure


def measure_of(
    content: Content,
    tokenizer: Path | None = None,
    max_pixels: int = VisionData.max_pixels,
    key: str | None = None,
) -> Measure:
    """What gives the length of a sample, from its members' bytes by extension: 16 kHz samples, tokens, 0 of an image,
    steps along an array's first axis after its channels. It decodes what training decodes, and raises for what training
    would lose.

    `tokenizer`: that of text, None where the shards hold ids. `max_pixels`: as
    data.vision.max_pixels of the recipe. `key`: of the array in a `.npz`, None where each holds one.
    """
    match content:
        case "image":
            from d2v_scale.modalities.vision import decoder as vision

            return functools.partial(vision.measure, max_pixels=max_pixels)
        case "recording":
            from d2v_scale.modalities.speech import decoder as speech

            return speech.measure
        case "text":
            from d2v_scale.modalities.text.decoder import TokenCounter

            return TokenCounter(tokenizer)
        case "array":
            from d2v_scale.modalities.array import members

            return functools.partial(members.measure, key=key)
    assert_never(content)


def measures_of(
    contents: Sequence[Content],
    tokenizer: Path | None = None,
    max_pixels: int = VisionData.max_pixels,
    key: str | None = None,
) -> dict[Content, Measure]:
    """What gives the length of each content of samples that hold several. Arguments as of `measure_of`."""
    held = list(contents)
    made = {content: measure_of(content, tokenizer, max_pixels, key) for content in held}
    hidden = {content: hidden_beside(content, held) for content in held}
    return {
        content: functools.partial(_without, one, hidden[content]) if hidden[content] else one
        for content, one in made.items()
    }


def _without(measure: Measure, hidden: frozenset[str], members: dict[str, bytes]) -> int:
    return measure({name: content for name, content in members.items() if name not in hidden})
