"""From a CTC head's frames to characters: the best path, or a beam over prefixes. Without a language model."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_UNLIKELY = -9.0
"""Characters with a smaller log-probability at a frame do not extend a prefix; they would cost time and win never."""


def greedy(log_probs_tc: Floats, blank: int = 0) -> list[int]:
    """Characters of the best path: repeats are joined, then blanks removed. `log_probs_tc` (T, C)."""
    best_t = log_probs_tc.argmax(axis=1)
    changes_t = np.append(True, best_t[1:] != best_t[:-1]) if len(best_t) else np.zeros(0, dtype=bool)
    return [int(number) for number in best_t[changes_t] if number != blank]


def beam_search(log_probs_tc: Floats, width: int, blank: int = 0) -> list[int]:
    """The most probable characters, summed over all paths that spell them (prefix beam search, Hannun et al. 2014).

    `log_probs_tc` (T, C), natural logarithms that sum to 1 at each frame; `width` prefixes are kept after each frame.
    """
    # Of each prefix: the log-probability of the paths that end with a blank, and of those that do not.
    beam: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for log_probs_c in log_probs_tc:
        likely = [int(c) for c in np.flatnonzero(log_probs_c > _UNLIKELY) if c != blank]
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], with_blank: float, without: float, into: dict = grown) -> None:  # type: ignore[type-arg]
            old_with, old_without = into.get(prefix, (-math.inf, -math.inf))
            into[prefix] = (_sum(old_with, with_blank), _sum(old_without, without))

        for prefix, (with_blank, without) in beam.items():
            either = _sum(with_blank, without)
            repeated = without + float(log_probs_c[prefix[-1]]) if prefix else -math.inf
            add(prefix, either + float(log_probs_c[blank]), repeated)
            for character in likely:
                # The same character again is a new one only after a blank.
                before = with_blank if prefix and prefix[-1] == character else either
                add((*prefix, character), -math.inf, before + float(log_probs_c[character]))
        best = sorted(grown.items(), key=lambda item: _sum(*item[1]), reverse=True)
        beam = dict(best[:width])
    return list(max(beam.items(), key=lambda item: _sum(*item[1]))[0])


def _sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a == -math.inf or b == -math.inf:
        return max(a, b)
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))
