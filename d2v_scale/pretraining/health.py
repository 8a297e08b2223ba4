"""From the logged figures to a warning, then to a verdict: a collapse, or a teacher that stands still."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.tracking.names import by_stem


@dataclass
class HealthMonitor:
    """Watches the figures of the log points. Feed it values that are the same on all ranks, and so is its verdict."""

    config: HealthConfig
    own: Mapping[str, HealthConfig] = field(default_factory=dict)
    """Limits of single sources, by their names."""
    unhealthy: dict[str, int] = field(default_factory=dict)
    """Log points in a row that each sign has been bad for, of those at which it was measured."""

    def observe(
        self, values: Mapping[str, float], completed_updates: int, decay: float, measured: Collection[str] = ()
    ) -> list[str]:
        """The signs that are bad now, in words. `values`: target_std, prediction_std, teacher_update_norm (spec 1.5)
        and lr.

        Where there are `target_std/<source>` and so on, each source is judged by itself, and only when it is one of
        those `measured` since the last call: the others of a mixture neither excuse it nor make it wait.

        The spread of targets and predictions counts only after `after` updates, as in the reference; a teacher
        that does not move although its decay is below 1 counts from the start.
        """
        bad: dict[str, str] = {}
        for name, source, limit in self._judged(values, measured):
            # Written so that a NaN counts as bad.
            if completed_updates > self._limits(source).after and not values[name] >= limit:
                whose = f" of {source}" if source else ""
                bad[name] = f"{name} is {values[name]:.4g}, below {limit:g}: the representations{whose} collapse"
        # The first update of a warm-up from zero moves nothing, rightly.
        moving = decay < 1 and values.get("lr", 1.0) > 0 and completed_updates > 1
        if moving and values.get("teacher_update_norm", 1.0) == 0.0:
            bad["teacher_update_norm"] = f"the teacher does not move, although its decay is {decay:g}"
        waiting = {
            name: times
            for name, times in self.unhealthy.items()
            if name not in values or ("/" in name and _source(name) not in measured)
        }
        self.unhealthy = waiting | {name: self.unhealthy.get(name, 0) + 1 for name in bad}
        return list(bad.values())

    def _judged(self, values: Mapping[str, float], measured: Collection[str]) -> Iterator[tuple[str, str, float]]:
        """Name, source ("": all of them) and limit of the figures that are looked at."""
        for figure in ("target_std", "prediction_std"):
            names = by_stem(values, figure)
            own = [name for source, name in names.items() if source]
            for name in own or names.values():
                if not own or _source(name) in measured:
                    yield name, _source(name), getattr(self._limits(_source(name)), f"min_{figure}")

    def _limits(self, source: str) -> HealthConfig:
        """Of a source; "": of all."""
        return self.own.get(source, self.config)

    @property
    def collapsed(self) -> bool:
        """Whether some sign has been bad for `patience` log points in a row."""
        return any(times >= self._limits(_source(name)).patience for name, times in self.unhealthy.items())


def _source(name: str) -> str:
    return name.partition("/")[2]
