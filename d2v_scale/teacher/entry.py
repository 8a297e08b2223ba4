"""Where passes enter the teacher's engine."""

from typing import Any

from torch import nn

from d2v_scale.parallel.groups import Topology


class Entry(nn.Module):
    """The root of the teacher's engine. Every kind of pass enters here, where ZeRO-3 starts its bookkeeping."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the teacher's forward pass, or another of its methods."""
        function = self.teacher if method == "forward" else getattr(self.teacher, method)
        return function(*args, **kwargs)

    def train(self, mode: bool = True) -> "Entry":
        """A teacher is always in eval mode."""
        return super().train(False)


def sharded_engine(entry: nn.Module, engine_config: dict[str, Any], topology: Topology) -> tuple[Any, Any]:
    """DeepSpeed's engine around the module and the stream it gathers parameters on; None where there are no streams.

    Collective: all ranks must call.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=entry, config=engine_config, mpu=topology.mpu, dist_init_required=False)
    engine.eval()
    # No public name leads to it. A DeepSpeed without this one must not be used unseen: gathers would read old values.
    return engine, engine.optimizer._DeepSpeedZeRoOffload__allgather_stream
