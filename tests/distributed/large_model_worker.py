"""One rank that builds a model of a billion parameters partitioned: large_model_worker.py RECIPE OUT.json

Rank 0 writes what every rank had before, at its peak, and after; and the sizes of the model. Bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2v_scale import command_line
from d2v_scale.model.init import full_shape_of, initialize
from d2v_scale.networks.stack import Student
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.zero import construct


def memory(name: str) -> int:
    """A line of this process's status: VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    recipe, _ = command_line.parse(["--recipe", sys.argv[1]])
    topology = groups.initialize()
    numbers = ds_config.RecipeNumbers(precision="bf16")
    zero = {"zero_optimization": {"stage": 3}}
    config = ds_config.resolve(zero, numbers, recipe.parallel, topology.world_size)
    # DeepSpeed itself, gloo's buffers: what there is before a model.
    construct(lambda: torch.nn.Linear(8, 8), config, topology)
    dist.all_reduce(torch.zeros(1 << 20))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak counts from here.
    student = construct(lambda: Student(recipe.model), config, topology)
    initialize(student, recipe.seed)
    found = {"before": before, "peak": memory("VmHWM"), "after": memory("VmRSS")}
    found["held"] = sum(p.ds_tensor.untyped_storage().nbytes() for p in student.parameters())
    found["gathered"] = sum(p.untyped_storage().nbytes() for p in student.parameters())
    ranks: list[Any] = [None] * topology.world_size
    dist.all_gather_object(ranks, found)
    sizes = {name: torch.Size(full_shape_of(p)).numel() for name, p in student.named_parameters()}
    blocks = [
        sum(n for name, n in sizes.items() if name.startswith(f"blocks.{i}.")) for i in range(len(student.blocks))
    ]
    if topology.rank == 0:
        model = {"parameters": sum(sizes.values()), "largest_layer": max(blocks), "largest": max(sizes.values())}
        Path(sys.argv[2]).write_text(json.dumps({"ranks": ranks, **model}))
    groups.shutdown()


if __name__ == "__main__":
    main()
