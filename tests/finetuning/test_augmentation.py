import numpy as np
import pytest
from PIL import Image

from d2v_scale.finetuning.augmentation import OPERATIONS, RandAugment


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_every_operation_keeps_size_and_mode_at_any_strength(mode: str, number: int) -> None:
    image = picture(mode)
    for strength in (0.0, 0.9, 1.0):
        for back in (False, True):
            changed = OPERATIONS[number](image, strength, back)
            assert (changed.size, changed.mode) == (image.size, mode)


def test_what_is_drawn_decides_and_half_of_the_operations_are_left_out() -> None:
    image, augment = picture("RGB"), RandAugment(9.0, 0.5)
    generator = np.random.default_rng(1)
    unchanged = 0
    for _ in range(200):
        draws = generator.random(RandAugment.draws)
        first, again = augment(image, draws), augment(image, draws)
        assert np.array_equal(np.asarray(first), np.asarray(again))
        unchanged += first is image
    # Two operations, each left out half of the time.
    assert 30 < unchanged < 72
