"""What to say of a pattern that the shell has resolved before we saw it."""

import itertools
from collections.abc import Sequence


def quoted(before: str, words: Sequence[str]) -> str:
    """The remedy for a pattern that the shell has resolved to these words."""
    start = _common(words)
    end = _common([word[len(start) :][::-1] for word in words])[::-1]
    return f"Quote the pattern, which your shell has resolved: {before}'{start}*{end}'."


def _common(words: Sequence[str]) -> str:
    """What all begin with, character by character."""
    alike = itertools.takewhile(lambda letters: len({*letters}) == 1, zip(*words, strict=False))
    return "".join(letters[0] for letters in alike)
