"""CTC decoding against the definition: all paths, spelled out."""

import itertools

import numpy as np
import pytest

from d2v_scale.finetuning.decoding import beam_search, greedy


def frames(seed: int, length: int, characters: int) -> np.ndarray:
    logits = 2.0 * np.random.default_rng(seed).standard_normal((length, characters))
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def spelled(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(number for number, _ in itertools.groupby(path) if number != 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_spelling_that_all_its_paths_make_most_probable(seed: int) -> None:
    log_probs_tc = frames(seed, 5, 3)
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=5):
        probability = float(np.exp(sum(log_probs_tc[t, c] for t, c in enumerate(path))))
        total[spelled(path)] = total.get(spelled(path), 0.0) + probability
    assert beam_search(log_probs_tc, 100) == list(max(total, key=total.__getitem__))


def test_the_most_probable_spelling_is_not_always_the_best_path() -> None:
    # "blank blank" is the best path (0.36), but the three others spell "1" together.
    log_probs_tc = np.log(np.array([[0.6, 0.4], [0.6, 0.4]], dtype=np.float32))
    assert greedy(log_probs_tc) == []
    assert beam_search(log_probs_tc, 4) == [1]


def test_a_character_repeats_only_across_a_blank() -> None:
    certain = np.full((5, 3), -30.0, dtype=np.float32)
    for frame, character in enumerate([1, 1, 0, 1, 2]):
        certain[frame, character] = 0.0
    assert greedy(certain) == beam_search(certain, 3) == [1, 1, 2]
    assert greedy(certain[:0]) == beam_search(certain[:0], 3) == []
