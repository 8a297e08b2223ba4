"""What prepares images for an exported model as its training did. A copy of this file lies beside the weights.

transformers turns a file that it opens itself upright, and leaves an image that it is given as it is stored.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BeitImageProcessorPil


class UprightImageProcessor(BeitImageProcessorPil):
    """Of Pillow's images the upright pixels, 8 bits a channel."""

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """The pixels (C, H, W)."""
        if isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return super().process_image(image, *args, **kwargs)

    def resize(self, image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """To a shape that is no square: of the largest centred part of that shape, not stretched."""
        if size.height and size.width and size.height != size.width:
            rows, columns = image.shape[-2:]
            across = min(columns, round(rows * size.width / size.height))
            down = min(rows, round(columns * size.height / size.width))
            top, left = (rows - down) // 2, (columns - across) // 2
            image = image[..., top : top + down, left : left + across]
        return super().resize(image, size, *args, **kwargs)
