"""Running programs of this package from others, which say only what went wrong."""

import subprocess
from typing import Any

from d2v_scale.errors import UserError


def run_quietly(command: list[str], what: str, **options: Any) -> None:
    """Run a program to its end, with `options` of `subprocess.run`. Raises UserError: that `what` ended, and why."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(f"{what} ended with code {done.returncode}: {' '.join(lines) or done.stderr[-800:]}")
