"""Ratios measured within one run, against a peer or between sizes: `python tools/bench.py BENCHMARK [--help]`.

Every row of a case ends in its ratio; above 1 means better than the peer, unless the row says otherwise.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


BENCHMARKS = ("step", "growth", "bias", "data", "teacher", "startup", "device", "extract", "plan")


def main(arguments: list[str]) -> int:
    """Run the benchmark named by the first argument; returns the exit code."""
    from d2v_scale.errors import EXIT_BAD_INPUT, UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    # A machine may lack what another benchmark needs.
    for name in arguments[:1] if arguments[:1] and arguments[0] in BENCHMARKS else BENCHMARKS:
        module = importlib.import_module(f"d2v_scale.benchmarks.{name}")
        command = commands.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, takes_recipe_keys=name == "step")
    options, options.overrides = parser.parse_known_args(arguments)
    if options.overrides and not options.takes_recipe_keys:
        parser.error(f"unrecognized arguments: {' '.join(options.overrides)}")
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
