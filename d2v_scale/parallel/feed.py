"""One reader for every copy of the model: its first rank reads the batches, the others get them from it.

Ranks that share one copy of the model (tensor parallel, pipeline) must see the same samples and masks. Reading once
makes that certain, also when a sample cannot be read, and leaves the decoding to as many processes as there are copies.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.batch import Batch, Layout
from d2v_scale.parallel.groups import Topology, model_group_on_host
from d2v_scale.process import faults


class SharedFeed:
    """The steps of `steps` on all ranks of a copy of the model; only its first rank asks for them.

    What a batch is like travels over host memory, its tensors from device to device. Collective to construct: all ranks
    must call. Iterating is collective over `topology.model_group`. An error of the reader is raised on all its ranks.
    """

    def __init__(self, steps: Iterator[list[Batch]], topology: Topology) -> None:
        self._steps = steps
        self._topology = topology
        self._reads = topology.model_size == 1 or dist.get_rank(topology.model_group) == 0
        self._host_group = model_group_on_host(topology) if topology.model_size > 1 else None

    def __iter__(self) -> "SharedFeed":
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step, on the device."""
        faults.point("data")
        if self._topology.model_size == 1:
            return next(self._steps)
        said: list[Any] = [None]
        batches: list[Batch] = []
        if self._reads:
            try:
                batches = next(self._steps)
                said = [[_description(batch) for batch in batches]]
            except Exception as error:
                said = [error]
        dist.broadcast_object_list(said, group=self._host_group, group_src=0)
        if isinstance(said[0], Exception):
            raise said[0]
        if not self._reads:
            batches = [_empty(description, self._topology.device) for description in said[0]]
        for batch in batches:
            for tensor in _tensors(batch).values():
                dist.broadcast(tensor, group=self._topology.model_group, group_src=0)
        return batches


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch under the name of its field, of its layout and parts with what they are before it;
    contiguous."""
    named = batch.own_tensors() | {f"layout.{name}": value for name, value in batch.layout.tensors.items()}
    for number, part in enumerate(batch.parts):
        named |= {f"parts.{number}.{name}": value for name, value in _tensors(part).items()}
    return named


def _description(batch: Batch) -> dict[str, Any]:
    """A batch without its tensors' values."""
    own = batch.own_tensors()
    kept = own | {f"layout.{name}": value for name, value in batch.layout.tensors.items()}
    assert all(tensor.is_contiguous() for tensor in kept.values())
    plain = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in own}
    return {
        "tensors": {name: (tuple(value.shape), value.dtype) for name, value in kept.items()},
        "plain": {name: value for name, value in plain.items() if name not in ("layout", "parts")},
        "parts": [_description(part) for part in batch.parts],
    }


def _empty(description: dict[str, Any], device: torch.device) -> Batch:
    """A batch of this description, its tensors not yet filled."""
    tensors: dict[str, Any] = {
        name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in description["tensors"].items()
    }
    named = [name for name in tensors if name.startswith("layout.")]
    layout = Layout(**{name.removeprefix("layout."): tensors.pop(name) for name in named})
    parts = tuple(_empty(part, device) for part in description["parts"])
    return Batch(**description["plain"], **tensors, layout=layout, parts=parts)
