"""RandAugment: a few random operations on an image, each of a random strength (Cubuk et al. 2020).

The variant that BEiT and its successors fine-tune with: strength grows with the magnitude for every operation, the
magnitude varies, and an operation is left out half of the time. Pillow only; what is drawn is handed in.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, ImageStat

_OPERATIONS_AN_IMAGE = 2
_DRAWS_AN_OPERATION = 5
_LARGEST = 10.0

Operation = Callable[[Image.Image, float, bool], Image.Image]
"""(image, strength from 0 to 1, direction) to an image of the same mode and size."""


class RandAugment:
    """Two operations of a magnitude near `magnitude` (0-10)."""

    draws = _OPERATIONS_AN_IMAGE * _DRAWS_AN_OPERATION
    """Uniforms that a call takes."""

    def __init__(self, magnitude: float, std: float) -> None:
        self._magnitude = magnitude
        self._std = std

    def __call__(self, image: Image.Image, draws: NDArray[np.float64]) -> Image.Image:
        """The augmented image, by uniforms in [0, 1)."""
        for u_applied, u_which, u_radius, u_angle, u_direction in draws.reshape(-1, _DRAWS_AN_OPERATION).tolist():
            if u_applied < 0.5:
                continue
            normal = math.sqrt(-2 * math.log(1 - u_radius)) * math.cos(2 * math.pi * u_angle)
            strength = min(max(self._magnitude + self._std * normal, 0.0), _LARGEST) / _LARGEST
            image = OPERATIONS[int(u_which * len(OPERATIONS))](image, strength, u_direction < 0.5)
        return image


def _shifted(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    fill = tuple(round(mean) for mean in ImageStat.Stat(image).mean)
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        Image.Resampling.BILINEAR,
        fillcolor=fill if len(fill) > 1 else fill[0],
    )


def _rotate(image: Image.Image, strength: float, back: bool) -> Image.Image:
    angle = math.radians(30 * strength * (-1 if back else 1))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = image.width / 2, image.height / 2
    return _shifted(image, (cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos))


def _shear_x(image: Image.Image, strength: float, back: bool) -> Image.Image:
    return _shifted(image, (1, 0.3 * strength * (-1 if back else 1), 0, 0, 1, 0))


def _shear_y(image: Image.Image, strength: float, back: bool) -> Image.Image:
    return _shifted(image, (1, 0, 0, 0.3 * strength * (-1 if back else 1), 1, 0))


def _translate_x(image: Image.Image, strength: float, back: bool) -> Image.Image:
    return _shifted(image, (1, 0, 0.45 * strength * image.width * (-1 if back else 1), 0, 1, 0))


def _translate_y(image: Image.Image, strength: float, back: bool) -> Image.Image:
    return _shifted(image, (1, 0, 0, 0, 1, 0.45 * strength * image.height * (-1 if back else 1)))


def _posterize(image: Image.Image, strength: float, _back: bool) -> Image.Image:
    return ImageOps.posterize(image, max(1, 4 - int(4 * strength)))


def _solarize(image: Image.Image, strength: float, _back: bool) -> Image.Image:
    return ImageOps.solarize(image, 256 - min(256, int(256 * strength)))


def _solarize_add(image: Image.Image, strength: float, _back: bool) -> Image.Image:
    added = min(128, int(110 * strength))
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhancing(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def enhanced(image: Image.Image, strength: float, back: bool) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + 0.9 * strength * (-1 if back else 1)))

    return enhanced


OPERATIONS: list[Operation] = [
    lambda image, _strength, _back: ImageOps.autocontrast(image),
    lambda image, _strength, _back: ImageOps.equalize(image),
    lambda image, _strength, _back: ImageOps.invert(image),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhancing(ImageEnhance.Color),
    _enhancing(ImageEnhance.Contrast),
    _enhancing(ImageEnhance.Brightness),
    _enhancing(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
]
