"""`d2v shards images`: folders of pictures."""

import argparse
from collections.abc import Iterable

from d2v_scale.conversion.command import Command, file_items
from d2v_scale.conversion.converters import Conversion, Item
from d2v_scale.conversion.folders import FoundFiles, find_files
from d2v_scale.modalities.vision import decoder as vision


class Images(Command):
    """Files of pictures."""

    content = "image"

    def read(
        self, arguments: argparse.Namespace, conversion: Conversion, known: list[str]
    ) -> tuple[FoundFiles, Iterable[Item], list[str]]:
        found = find_files(arguments.source, vision.EXTENSIONS, arguments.match)
        conversion.resize, conversion.max_pixels = arguments.resize, arguments.max_pixels
        return found, *file_items(found, arguments.label, known)
