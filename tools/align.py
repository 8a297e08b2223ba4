"""`d2v align` from a clone: d2v_scale/commands/align.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from d2v_scale.commands.verbs import run

    sys.exit(run("align", sys.argv[1:]))
else:
    from d2v_scale.commands.align import main  # noqa: F401
