"""Video: scikit-learn's handwritten digits on the move; the label is the direction.

A digit moves by a step a frame through a square whose edges meet, and comes round once. A video and the same one the
other way hold the same frames in another order, so neither one frame nor the mean of all tells between the two.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.conversion.array_members import npy_bytes
from d2v_scale.modalities.array.members import measure
from d2v_scale.shards.writing import Sample, write_set

FRAMES, SIDE = 8, 16
STEP = SIDE // FRAMES
"""Pixels a frame."""
DIRECTIONS = {
    "right": (0, 1),
    "left": (0, -1),
    "down": (1, 0),
    "up": (-1, 0),
    "down_right": (1, 1),
    "up_left": (-1, -1),
    "down_left": (1, -1),
    "up_right": (-1, 1),
}
"""Steps along height and width in a frame; a class each, in this order."""

_TEST_SHARE = 0.2
_PER_SHARD = 256


def moving(digit: NDArray[np.uint8], start: tuple[int, int], direction: str) -> NDArray[np.uint8]:
    """uint8 (1, FRAMES, SIDE, SIDE): `digit`, at most SIDE pixels a side, whose upper left corner is at `start` in the
    first frame."""
    square = np.zeros((SIDE, SIDE), dtype=np.uint8)
    square[: digit.shape[0], : digit.shape[1]] = digit
    down, right = DIRECTIONS[direction]
    shifts = [(start[0] + STEP * frame * down, start[1] + STEP * frame * right) for frame in range(FRAMES)]
    return np.stack([np.roll(square, shift, axis=(0, 1)) for shift in shifts])[None]


def write(out: Path) -> None:
    """Write the shards of both splits to `out`. No digit is in both."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(0)
    names = list(DIRECTIONS)
    samples: list[Sample] = []
    for number in rng.permutation(len(digits.target)):
        label = int(rng.integers(len(names)))
        start: Any = tuple(rng.integers(SIDE, size=2).tolist())
        image = (digits.images[number] * (255 / 16)).round().astype(np.uint8)
        samples.append(
            {
                "__key__": f"moving-{number:05d}",
                "npy": npy_bytes(moving(image, start, names[label])),
                "cls": label,
                "json": {"digit": int(digits.target[number]), "direction": names[label], "start": list(start)},
            }
        )
    held_out = round(_TEST_SHARE * len(samples))
    for split, chosen in (("train", samples[held_out:]), ("test", samples[:held_out])):
        write_set(out, split, "array", chosen, per_shard=_PER_SHARD, measure=measure, classes=names)
