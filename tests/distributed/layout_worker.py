"""One rank of two: layouts of the student that are not where they are said to be (`layout_worker.py OUT.json`).

Rank 0 writes what `check_layout` says of each case; no error is null.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import toy_model as toy

from d2v_scale.errors import ConfigError
from d2v_scale.parallel import ds_config, groups, zero
from d2v_scale.parallel.layout_check import _cut_elsewhere, check_layout
from d2v_scale.parallel.shards import Shard, full_shape

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
Change = Callable[[zero.StudentEngine], list[Shard]]


def by_deepspeeds_names(student: zero.StudentEngine) -> list[Shard]:
    """What DeepSpeed's own table says, which `round_robin_gradients` does not keep to."""
    shards = []
    for name, parameter in student.module.named_parameters():
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        if fragment is not None:
            master = student.engine.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
            part, place = fragment.lp_fragment_address, fragment.hp_fragment_address
            shards.append(Shard(name, full_shape(parameter), None, part.start, part.numel, master, place.start))
    return shards


@torch.no_grad()
def all_zero(student: zero.StudentEngine) -> list[Shard]:
    """The same where values say nothing: every weight is zero."""
    for shard in student.shards():
        shard.weight.zero_()
    student.begin_loading()
    student.finish_loading(0)
    return by_deepspeeds_names(student)


def one_lost(student: zero.StudentEngine) -> list[Shard]:
    return student.shards()[1:] if student.topology.rank == 1 else student.shards()


def one_twice(student: zero.StudentEngine) -> list[Shard]:
    first, *rest = student.shards()
    return [first, *rest, first]


@torch.no_grad()
def other_values(student: zero.StudentEngine) -> list[Shard]:
    """A master that does not hold what the forward pass reads, on one rank."""
    if student.topology.rank == 1:
        student.shards()[0].weight.add_(1)
    return student.shards()


def another_cut(student: zero.StudentEngine) -> list[Shard]:
    """Each rank takes itself for the other."""
    return student.shards()


ROUND_ROBIN = {"round_robin_gradients": True}
CASES: dict[str, tuple[dict, Change]] = {
    "round robin, by addresses": ({"stage": 2, **ROUND_ROBIN}, zero.StudentEngine.shards),
    "round robin, by DeepSpeed's names": ({"stage": 2, **ROUND_ROBIN}, by_deepspeeds_names),
    "round robin, offload": ({"stage": 1, **ROUND_ROBIN, **OFFLOAD}, by_deepspeeds_names),
    "round robin, all zero": ({"stage": 1, **ROUND_ROBIN}, all_zero),
    "names of DeepSpeed, in order": ({"stage": 1}, by_deepspeeds_names),
    "lost at stage 2": ({"stage": 2}, one_lost),
    "lost at stage 3": ({"stage": 3}, one_lost),
    "twice": ({"stage": 3}, one_twice),
    "other values, offload": ({"stage": 2, **OFFLOAD}, other_values),
    "cut elsewhere": ({"stage": 3, "stage3_param_persistence_threshold": 0}, another_cut),
    "other values at stage 3, offload": ({"stage": 3, **OFFLOAD}, other_values),
}


def verdict(raw: dict, change: Change, topology: groups.Topology) -> str | None:
    numbers = ds_config.RecipeNumbers(precision="fp32")
    config = ds_config.resolve({"zero_optimization": raw}, numbers, groups.ParallelConfig(), topology.world_size)
    student = zero.build_student(
        toy.Student, config, lambda named: toy.optimizer(named, toy.Settings()), topology, toy.initialize
    )
    if change is another_cut:
        return _cut_elsewhere(student.module, 1 - topology.data_parallel_rank)
    try:
        check_layout(student.module, change(student), student.engine.optimizer, student.stage, topology)
    except ConfigError as error:
        return str(error)
    finally:
        student.destroy()
    return None


def main() -> None:
    topology = groups.initialize(groups.ParallelConfig())
    found = {name: verdict(raw, change, topology) for name, (raw, change) in CASES.items()}
    Path(f"{sys.argv[1]}.{topology.rank}").write_text(json.dumps(found))
    groups.shutdown()


if __name__ == "__main__":
    main()
