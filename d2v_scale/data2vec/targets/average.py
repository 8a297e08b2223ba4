"""Targets that are what some blocks put out."""

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.base import Place, Target
from d2v_scale.errors import ConfigError


class AverageTopK(Target):
    """`average_top_k`: each tap normalised, the mean of all taps, normalised again (spec 1.2)."""

    in_reference = True


class LastLayer(Target):
    """`last_layer`: the tap of the last main block, normalised."""

    in_reference = True

    def choose_layers(self, config: TargetConfig, place: Place) -> tuple[int, ...]:
        """One, whatever `top_k_layers` is."""
        refuse_layers(config)
        return (place.depth - 1,)


def refuse_layers(config: TargetConfig) -> None:
    """Raises `ConfigError` where layers are chosen for a kind that has no choice."""
    if config.layers is not None:
        raise ConfigError(
            "objective.target.layers",
            f"is {config.layers}, which targets of kind {config.kind} do not read.",
            "Leave it out, or choose another objective.target.kind.",
        )
