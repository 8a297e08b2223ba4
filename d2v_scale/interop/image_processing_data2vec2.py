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
