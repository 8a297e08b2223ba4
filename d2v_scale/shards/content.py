"""What shards hold. What reads it is a stem of a model, and another matter: one set of shards may serve several."""

from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from d2v_scale.data.config import SAMPLE_RATE

Content = Literal["image", "recording", "text", "array"]
"""What a sample is: a closed set. Where one is not handled, the type checker complains."""
CONTENTS: tuple[Content, ...] = get_args(Content)
WORDS: dict[str, Content] = {"vision": "image", "speech": "recording", "text": "text", "array": "array"}
"""What commands, and indexes of earlier versions, call each."""


@dataclass(frozen=True)
class Length:
    """What an index counts the length of a sample in."""

    unit: str
    shown: tuple[str, str, int] | None = None
    """What a length is called, its unit for people, and how many of `unit` are one; None: there is none."""


def length_of(content: Content) -> Length:
    """How the samples' lengths are counted."""
    match content:
        case "image":
            return Length("none")
        case "recording":
            return Length("samples at 16 kHz", ("duration", "s", SAMPLE_RATE))
        case "text":
            return Length("tokens", ("length", "tokens", 1))
        case "array":
            return Length("steps along the first axis after the channels", ("length", "steps", 1))
    assert_never(content)


def word_of(content: Content) -> str:
    """What commands call it."""
    return next(word for word, meant in WORDS.items() if meant == content)


def plural(content: Content) -> str:
    """For messages: `images`, `recordings`, `texts`."""
    return f"{content}s"
