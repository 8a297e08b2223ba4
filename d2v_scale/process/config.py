"""What of a process a recipe may ask to be recorded."""

from dataclasses import dataclass

from d2v_scale.errors import ConfigError


@dataclass(kw_only=True)
class ProfileConfig:
    """Which steps are profiled. Recording slows a step down; others are not touched."""

    steps: str | None = None
    """First and last step, as `20:24`; null: none."""

    def bounds(self) -> tuple[int, int] | None:
        """First and last step. Raises ConfigError for anything else than two growing positive numbers."""
        if self.steps is None:
            return None
        first, colon, last = self.steps.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError("profile.steps", f"is {self.steps!r}", "Write FIRST:LAST, for example 20:24.")
        return int(first), int(last)
