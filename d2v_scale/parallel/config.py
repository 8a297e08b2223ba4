"""How the world is divided."""

from dataclasses import dataclass

from d2v_scale.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """How the world is divided. World size = tensor * pipeline * data-parallel size."""

    tensor: int = 1
    """Tensor-parallel size: ranks that share every block's matrices."""
    pipeline: int = 1
    """Pipeline stages: ranks that share the list of layers."""


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """World size / (tensor * pipeline). Raises ConfigError when that is not a whole number. Needs no process group."""
    model_size = config.tensor * config.pipeline
    if config.tensor < 1 or config.pipeline < 1:
        raise ConfigError("parallel", f"tensor={config.tensor}, pipeline={config.pipeline}", "Sizes start at 1.")
    if world_size % model_size:
        raise ConfigError(
            "parallel",
            f"{world_size} processes cannot be divided by tensor={config.tensor} x pipeline={config.pipeline}",
            f"Start a multiple of {model_size} processes.",
        )
    return world_size // model_size
