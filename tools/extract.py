"""`d2v extract` from a clone: d2v_scale/commands/extract.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from d2v_scale.commands.verbs import run

    sys.exit(run("extract", sys.argv[1:]))
else:
    from d2v_scale.commands.extract import main  # noqa: F401
