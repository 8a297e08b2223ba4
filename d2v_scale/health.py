"""From the logged figures to a warning, then to a verdict: a collapse, or a teacher that stands still."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from d2v_scale.data2vec.config import HealthConfig


@dataclass
class HealthMonitor:
    """Watches the figures of the log points. Feed it values that are the same on all ranks, and so is its verdict."""

    config: HealthConfig
    unhealthy: dict[str, int] = field(default_factory=dict)
    """Log points in a row that each sign has been bad for."""

    def observe(self, values: Mapping[str, float], completed_updates: int, decay: float) -> list[str]:
        """The signs that are bad now, in words. `values`: target_std, prediction_std, teacher_update_norm (spec 1.5)
        and lr.

        The spread of targets and predictions counts only after `config.after` updates, as in the reference; a teacher
        that does not move although its decay is below 1 counts from the start.
        """
        bad: dict[str, str] = {}
        if completed_updates > self.config.after:
            limits = {"target_std": self.config.min_target_std, "prediction_std": self.config.min_prediction_std}
            for name, limit in limits.items():
                # Written so that a NaN counts as bad.
                if name in values and not values[name] >= limit:
                    bad[name] = f"{name} is {values[name]:.4g}, below {limit:g}: the representations collapse"
        # The first update of a warm-up from zero moves nothing, rightly.
        moving = decay < 1 and values.get("lr", 1.0) > 0 and completed_updates > 1
        if moving and values.get("teacher_update_norm", 1.0) == 0.0:
            bad["teacher_update_norm"] = f"the teacher does not move, although its decay is {decay:g}"
        self.unhealthy = {name: self.unhealthy.get(name, 0) + 1 for name in bad}
        return list(bad.values())

    @property
    def collapsed(self) -> bool:
        """Whether some sign has been bad for `config.patience` log points in a row."""
        return any(times >= self.config.patience for times in self.unhealthy.values())
