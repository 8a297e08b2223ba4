"""When this attempt of a run was started, and what its launcher says of that. Standard library only."""

import json
import os
import time
from pathlib import Path

STARTED = "D2V_SCALE_STARTED"
"""Environment: when a launcher began to start this attempt (Unix seconds)."""
RESTART = "D2V_SCALE_RESTART"
"""Environment: how often the launcher has started the ranks again."""
EXCLUDED = "D2V_SCALE_EXCLUDED"
"""Environment: nodes of this job that take no part any more, and why: a JSON object."""
MEASURE = "D2V_SCALE_MEASURE"
"""Environment: with 0 a run does not measure what its CPU is faster in (`running.arithmetic`)."""
TELL = "D2V_SCALE_TELL_RUN_DIR"
"""Environment: the file in which the launcher wants to read where the run directory is."""


def started() -> float:
    """When this attempt was started (Unix seconds): the process, or before it its launcher."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    own = round(time.time() - age_s, 3)
    return min(own, number(STARTED) or own)


def number(name: str) -> float | None:
    """A number in the environment; None where there is none."""
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        return None


def excluded() -> dict[str, str]:
    """Nodes of this job that take no part any more, and why, as far as the launcher says so."""
    try:
        return dict(json.loads(os.environ.get(EXCLUDED, "{}")))
    except ValueError:
        return {}


def tell_run_dir(directory: Path) -> None:
    """Let the launcher know where the run directory is, if it asks. Of one rank."""
    if path := os.environ.get(TELL):
        Path(path).write_text(str(directory.resolve()))
