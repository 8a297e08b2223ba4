"""Compare this package with a recorded reference run: one line a quantity. Exit code 1: one differs, or targets,
predictions or loss are not in the recording; 2: bad input."""

import argparse
import os
import sys
import warnings
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fixture", type=Path, help="folder with meta.json, io, student_init, teacher_init, ...")
    fixture = parser.parse_args(arguments).fixture

    warnings.filterwarnings("ignore", module="megatron")
    from d2v_scale.errors import EXIT_BAD_INPUT, UserError
    from d2v_scale.interop.golden_check import check, summary, uncompared
    from d2v_scale.parallel.groups import single_process

    single_process()
    quantities = []
    try:
        for quantity in check(fixture):
            print(quantity.line(), flush=True)
            quantities.append(quantity)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"{fixture}: {summary(quantities)}")
    missing = uncompared(quantities)
    if missing:
        print(f"FAIL: the recording does not hold what decides parity: {', '.join(missing)}")
    return 1 if missing or any(quantity.passed is False for quantity in quantities) else 0


if __name__ == "__main__":
    # The package lies beside this folder, and nothing in it may shadow a module.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.exit(main())
