"""Images: decode, crop, flip, jitter, normalise. Pillow only."""

import io
import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageEnhance, ImageOps, UnidentifiedImageError

from d2v_scale.data.config import VisionData
from d2v_scale.errors import ConfigError
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.shards.reading import RawSample, Store
from d2v_scale.shards.rows import Row, Stacked

EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "ppm", "pgm", "pbm", "pnm", "gif", "tif", "tiff")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""What Pillow reads in every installation; what a file is called says nothing."""
_REFUSED_FORMATS = {
    b"ftypavi": "AVIF",
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypmsf1": "HEIC",
    b"ftypjxl": "JPEG XL",
    b"jP  ": "JPEG 2000",
}
"""By the bytes from the fifth on."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by the orientation in its EXIF data."""
_SIDEWAYS = (5, 6, 7, 8)
_TRIES = 10
DRAWS = 4 * _TRIES + 8
_JITTER_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]


def crop_box(width: int, height: int, config: VisionData, draws: NDArray[np.float64], aspect: float = 1.0) -> Box:
    """A random crop: area uniform in `crop_scale` of the image, log(width/height) uniform in `crop_ratio` of `aspect`,
    the width over the height of what it is resized to.

    Up to ten tries; then the largest centred crop whose ratio is allowed (the usual random resized crop).
    """
    low, high = (math.log(ratio) for ratio in config.crop_ratio)
    for u_area, u_ratio, u_left, u_top in draws[: 4 * _TRIES].reshape(_TRIES, 4).tolist():
        area = width * height * (config.crop_scale[0] + u_area * (config.crop_scale[1] - config.crop_scale[0]))
        ratio = aspect * math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * (aspect * config.crop_ratio[1]))))
    h = min(height, max(1, round(width / (aspect * config.crop_ratio[0]))))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int, fraction: float, aspect: float = 1.0) -> Box:
    """Centred, with `fraction` of the sides of the largest box of `aspect`, width over height."""
    across = min(width, height * aspect) * fraction
    down = across / aspect
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey at 8 bits, its high bytes (Pillow's own conversion clips at 255); other images as they are.

    Raises ValueError for 32-bit and float images, which say nothing of their range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode[0] in "IF":
        raise ValueError(f"it has pixels of mode {image.mode}, whose range is not known: store 8 or 16 bits")
    return image


def open_image(content: bytes | memoryview, max_pixels: int) -> Image.Image:
    """An image of a format that is read; of a JPEG the header only. Raises ValueError, and what Pillow does.

    Larger images than `max_pixels` are refused before anything is decoded.
    """
    if len(content) == 0:
        raise ValueError("is empty")
    pillows_own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # there is one limit, and it is configured
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        begins = bytes(content[4:12])
        called = next((name for magic, name in _REFUSED_FORMATS.items() if begins.startswith(magic)), None)
        what = f"is {called}, which is not read" if called else "is no image of a format that is read"
        raise ValueError(f"{what} ({', '.join(_FORMATS)})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_own
    if image.width * image.height > max_pixels:
        raise ValueError(f"has {image.width} x {image.height} pixels, more than data.vision.max_pixels={max_pixels}")
    if image.width * image.height == 0:
        raise ValueError("has no pixels")
    if image.format != "JPEG":  # which alone can be decoded at a fraction of its size
        image.load()
    return image


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF counts; 1 where it is not told, or not legibly. Pillow turns TIFFs itself."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of damaged EXIF data; the image may be sound
        return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as the image is meant to be seen."""
    return (image.height, image.width) if _orientation(image) in _SIDEWAYS else image.size


def upright(image: Image.Image, mode: str, factor: int = 1) -> Image.Image:
    """The pixels of what `open_image` gave, 8 bits a channel, as the image is meant to be seen. A JPEG is decoded at
    1/`factor` of its size (1, 2, 4 or 8). Raises ValueError for pixels of unknown range, and what Pillow does."""
    turn = _TURNS.get(_orientation(image))
    if factor > 1 and image.format == "JPEG":
        image.draft(mode, (-(-image.width // factor), -(-image.height // factor)))
    image.load()
    image = eight_bit(image)
    if image.mode != mode:
        image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def measure(members: Mapping[str, bytes | memoryview], max_pixels: int = VisionData.max_pixels) -> int:
    """0: images have no length. Raises where training could not use the sample's image."""
    content = next((data for extension, data in members.items() if extension in EXTENSIONS), None)
    if content is None:
        raise ValueError(f"has no .{', .'.join(EXTENSIONS)}")
    upright(open_image(content, max_pixels), "RGB", factor=8)
    return 0


class VisionDecoder:
    """Samples to rows of pixels, rows to a normalised batch."""

    draws = DRAWS
    extensions: tuple[str, ...] = EXTENSIONS

    def __init__(self, config: VisionData, stem: VisionStem) -> None:
        if min(len(config.mean), len(config.std)) < stem.channels:
            raise ConfigError("data.vision.mean", f"has fewer values than the model's {stem.channels} channels")
        self._config = config
        self._height, self._width = stem.size
        self._aspect = self._width / self._height
        self._grid = stem.grid
        self._mode = {1: "L", 3: "RGB"}.get(stem.channels)
        if self._mode is None:
            raise ConfigError("model.vision.channels", f"is {stem.channels}", "Images have 1 or 3 channels.")
        mean = torch.tensor(config.mean[: stem.channels]) * 255
        std = torch.tensor(config.std[: stem.channels]) * 255
        self._scale_c11 = (1 / std)[:, None, None]
        self._shift_c11 = (-mean / std)[:, None, None]

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """A view of the image: uint8 (H, W, channels)."""
        sample = store.read(shard, item)
        return Row(sample.key, np.asarray(self.view(sample, draws)))

    def part_row(self, sample: RawSample, draws: NDArray[np.float64]) -> tuple[Pixels, bool]:
        """The same: all views are of one size."""
        return np.asarray(self.view(sample, draws)), False

    def view(self, sample: RawSample, draws: NDArray[np.float64]) -> Image.Image:
        """Crop, flip and jitter by `draws`, uniforms in [0, 1)."""
        image = self._open(sample)
        resized = self._resize(image, crop_box(*upright_size(image), self._config, draws, self._aspect))
        u_flip, u_order, *u_jitter = draws[4 * _TRIES : 4 * _TRIES + 5].tolist()
        if any(self._config.jitter):
            resized = self._jitter(resized, u_order, u_jitter)
        return ImageOps.mirror(resized) if u_flip < self._config.flip else resized

    def evaluation_row(self, sample: RawSample) -> Pixels:
        """The centre crop: uint8 (H, W, channels)."""
        image = self._open(sample)
        box = centre_box(*upright_size(image), self._config.evaluation_crop, self._aspect)
        return np.asarray(self._resize(image, box))

    def stack(self, rows: list[Pixels], longest: int | None = None) -> Stacked:
        """float32 (B, C, H, W), normalised. All are of one size."""
        del longest
        pixels_bhwc = np.stack(rows).reshape(len(rows), self._height, self._width, -1)
        inputs = (
            torch.from_numpy(pixels_bhwc).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        )
        return Stacked(inputs.mul_(self._scale_c11).add_(self._shift_c11), grid=self._grid)

    def blank(self) -> Pixels:
        """A row of a batch that has none."""
        return np.zeros((self._height, self._width, len(self._scale_c11)), dtype=np.uint8)

    def _open(self, sample: RawSample) -> Image.Image:
        _, content = sample.member(EXTENSIONS)
        try:
            return open_image(content, self._config.max_pixels)
        except ValueError as error:
            raise sample.fault(str(error)) from None

    def _resize(self, image: Image.Image, box: Box) -> Image.Image:
        """`box` of the upright image at the model's size, bicubic. Large JPEGs are decoded at a fraction of theirs."""
        assert self._mode is not None
        width, height = upright_size(image)
        reduction = min((box[2] - box[0]) / self._width, (box[3] - box[1]) / self._height)
        factor = 1 << min(3, int(math.log2(reduction))) if reduction >= 2 else 1
        image = upright(image, self._mode, factor)
        if image.size != (width, height):
            across, down = image.width / width, image.height / height
            box = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
        return image.resize((self._width, self._height), Image.Resampling.BICUBIC, box=box)

    def _jitter(self, image: Image.Image, u_order: float, u_jitter: list[float]) -> Image.Image:
        """Brightness, contrast and saturation, in random order, each by a factor uniform in 1 - s .. 1 + s.

        After the crop, not before as in the reference: the same colours at a fraction of the cost, except that contrast
        turns about the mean of the crop.
        """
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for k in _JITTER_ORDERS[int(u_order * len(_JITTER_ORDERS))]:
            strength = self._config.jitter[k]
            if strength > 0:
                low = max(0.0, 1 - strength)
                image = kinds[k](image).enhance(low + u_jitter[k] * (1 + strength - low))
        return image
