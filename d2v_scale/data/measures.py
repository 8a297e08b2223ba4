"""What decides whether a sample can be read: one function per content, for converters, indexes, checks and training."""

from pathlib import Path

from d2v_scale.data.shard_index import Measure
from d2v_scale.model.config import Modality


def measure_of(modality: Modality, tokenizer: Path | None = None) -> Measure:
    """What gives the length of a sample of `modality`, from its members' bytes by extension: 16 kHz samples, tokens, 0
    of an image. It decodes what training decodes, and raises for what training would lose.

    `tokenizer`: the sentencepiece model of text, None where the shards hold ids.
    """
    if modality == "vision":
        from d2v_scale.data.vision import measure

        return measure
    if modality == "speech":
        from d2v_scale.data.speech import measure as speech_measure

        return speech_measure
    from d2v_scale.data.text import TokenCounter

    return TokenCounter(tokenizer)
