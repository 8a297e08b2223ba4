"""What a recipe costs on a cluster, before a job is queued: FLOPs, memory, traffic, and how to divide the work.

    d2v plan --recipe d2v2_vision_huge14 --nodes 32 --gpus 8 --device h100 [--KEY VALUE ...]
    d2v plan --recipe d2v2_vision_huge14 --gpus 8 --calibrate     # on a node: measure it first (two minutes)
    d2v plan --table --device h100

Lists the legal topologies, fastest first, and those that do not fit in memory with what is missing. Further arguments
are recipe keys, as train.py takes them. `--table`: students of 0.3, 1, 7 and 30 billion parameters on 8 to 1024
devices, as Markdown. Nothing is allocated. All times are estimates, from peak numbers and what is
assumed to be reached of them, or from what `--calibrate` measures on this machine with as many ranks as `--gpus`: what
products, collectives and a pipeline's hops take, and the host for a layer, a micro-batch and a step. It is kept in
`--calibration FILE`, which later plans on the same machine read. Bytes held and bytes sent are counted, and agree with
measured ones in the tests.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.planning import hardware

if TYPE_CHECKING:
    from d2v_scale.planning.costs import Costs


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", help="recipe of the package or a YAML file")
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes")
    parser.add_argument("--gpus", type=int, default=8, help="devices on each node")
    parser.add_argument("--device", default="h100", help=f"one of {', '.join(hardware.PRESETS)}")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed utilisation of the peak, as a fraction")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine, and plan with that")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="measurements of this machine, kept (calibration.json) or read"
    )
    parser.add_argument("--show", type=int, default=8, help="rows of each list")
    parser.add_argument("--table", action="store_true", help="sizes by devices, instead of one recipe")
    return parser


def _costs(
    options: argparse.Namespace, keys: list[str], device: hardware.Hardware
) -> tuple[hardware.Hardware, "Costs"]:
    """The device that is planned with, and what a step's parts take on it. Raises ConfigError."""
    from d2v_scale.planning import calibration, costs

    if options.calibrate:
        from d2v_scale import command_line
        from d2v_scale.benchmarks.calibrate import calibrate

        options.calibration = options.calibration or Path("calibration.json")
        given = command_line.parse([f"--recipe={options.recipe}", *keys])[0].precision if options.recipe else "auto"
        found = calibrate(options.gpus, device, precision=given)
        calibration.write(options.calibration, found)
    elif options.calibration is not None:
        found = calibration.read(options.calibration)
    else:
        return device, costs.assumed(device, options.mfu)
    return calibration.this_device(options.gpus, device), found.costs


def main(arguments: list[str] | None = None) -> int:
    """Print the plan, or the table."""
    options, keys = make_parser().parse_known_args(arguments)
    if options.nodes < 1 or options.gpus < 1 or not 0 < options.mfu <= 1:
        print("error: nodes and gpus start at 1, mfu is above 0 and at most 1", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.table is (options.recipe is not None):
        print("error: give --recipe or --table", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        device = hardware.preset(options.device)
        from d2v_scale.planning.printing import lines_of

        print("\n".join(lines_of(options, keys, *_costs(options, keys, device))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
