"""How this package's programs are started as processes of their own, from a clone or installed."""

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
TRAINING = _PACKAGE / "train.py"
"""What `deepspeed` and other launchers start."""


def own_program(verb: str, *arguments: str) -> list[str]:
    """The words that start `d2v VERB` with this interpreter."""
    return [sys.executable, str(_PACKAGE / "__main__.py"), verb, *arguments]
