"""Look into shards: statistics, integrity, and pictures of batches with the masks drawn on.

    d2v inspect 'demo_data/vision/train-*.tar' --out out/preview
    d2v inspect PATTERN --check                # decodes every sample; exit 2 when one is damaged
    d2v inspect PATTERN --recipe d2v2_vision_base --out out/preview

    d2v inspect PATTERN --moments              # of arrays: mean and deviation of each channel, for model.arrays.NAME
    d2v inspect PATTERN --moments --recipe tiny2_mel             # of recordings, as the log-mel that its stem makes

Without `--recipe` the masks of the preview are random with probability 0.5, and arrays are drawn as they are stored.
"""

import argparse
import sys

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.data.config import VisionData
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("shards", help="path with {000000..000099}, glob, directory or index file")
    parser.add_argument("--index", help="index file of shards that are not local")
    parser.add_argument("--check", action="store_true", help="decode every sample and compare its checksum")
    parser.add_argument(
        "--max_pixels", type=int, default=VisionData.max_pixels, help="as data.vision.max_pixels of the recipe"
    )
    parser.add_argument("--out", type=out_folder, help="directory for pictures; default: none are drawn")
    parser.add_argument("--recipe", help="recipe whose crops, masks and log-mel are shown")
    parser.add_argument("--steps", type=int, default=2, help="pictures")
    parser.add_argument("--key", help="of the array in each .npz; default: the only one")
    parser.add_argument("--moments", action="store_true", help="measure mean and deviation of arrays, or of log-mel")
    parser.add_argument("--transform", choices=["none", "log"], default="none", help="before --moments, as of the stem")
    parser.add_argument("--log_floor", type=float, default=1e-6, help="as model.arrays.NAME.log_floor")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print statistics, check, draw."""
    options = make_parser().parse_args(arguments)
    from d2v_scale.conversion.inspecting import inspect

    try:
        lost = inspect(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_BAD_INPUT if lost else 0
