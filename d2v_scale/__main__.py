"""`python -m d2v_scale VERB`: the same as `d2v VERB`."""

import sys

if not __package__:
    # Started by its path: the folder of a script comes first on sys.path, where our modules would stand for others.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from d2v_scale.commands.verbs import main

    sys.exit(main())
