"""Vision: the 1,797 handwritten digits of scikit-learn, 8x8 pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_scale.shards.writing import Sample, write_set

_TEST_SHARE = 0.2
_PER_SHARD = 256


def write(out: Path) -> None:
    """Write the shards of both splits to `out`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    samples: list[Sample] = []
    for number in order:
        content = io.BytesIO()
        Image.fromarray((digits.images[number] * (255 / 16)).round().astype(np.uint8)).save(content, "PNG")
        samples.append({"__key__": f"digit-{number:05d}", "png": content.getvalue(), "cls": int(digits.target[number])})
    held_out = round(_TEST_SHARE * len(samples))
    classes = [str(digit) for digit in range(10)]
    write_set(out, "train", "image", samples[held_out:], per_shard=_PER_SHARD, classes=classes)
    write_set(out, "test", "image", samples[:held_out], per_shard=_PER_SHARD, classes=classes)
