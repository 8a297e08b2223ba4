"""The names of checkpoints and which of them are complete; for programs that read none, so without torch."""

from pathlib import Path

MARKER = "COMMITTED"
"""Written last: a directory without it is not a checkpoint."""


def directory_name(step: int) -> str:
    """`step-00000040`."""
    return f"step-{step:08d}"


def committed_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in `root` that carry a marker, rising. Copies under other names are not the run's."""
    steps = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and (path / MARKER).exists():
            steps.append(int(number))
    return sorted(steps)
