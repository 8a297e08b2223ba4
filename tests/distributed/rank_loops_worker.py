"""One rank of three: DeepSpeed's own gathers, scatters and steps beside those without loops over ranks, bit by bit."""

from typing import Any

import deepspeed
import plan_worker
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3

from d2v_scale.batch import Batch
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import groups, rank_loops
from d2v_scale.planning import legal
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step

SIZES = ((1,), (6,), (7,), (1, 7, 100, 64, 12), (2, 2), (9, 3, 1), (3, 3), (1, 1, 1))
"""Of tensors in one bucket: of one element, divisible by three and not, with ranks that have nothing of one."""

CASES = (("fp32", 1, 1), ("bf16", 1, 2), ("bf16", 2, 2), ("fp32", 3, 2), ("bf16", 3, 1))
"""Precision, ZeRO stage, micro-batches."""


def check_scatter(theirs: Any, dtype: torch.dtype) -> None:
    ours = rank_loops.reduce_scatter_with(theirs)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for sizes in SIZES:
        tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        found = ours([x.clone() for x in tensors], None)
        expected = theirs([x.clone() for x in tensors], None)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), (dtype, sizes, x, y)


def check_gather(topology: groups.Topology, dtype: torch.dtype) -> None:
    """Both ways over the same partitioned parameters."""
    strided = 0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    for sizes in SIZES:
        with deepspeed.zero.Init(config_dict_or_path=config, data_parallel_group=topology.data_parallel_group):
            module = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for size in sizes])
        parameters: Any = list(module.parameters())
        closure = parameters[0].all_gather_coalesced.__closure__
        init, theirs = (cell.cell_contents for cell in closure)
        assert callable(theirs), "gather_with closes over the Init and DeepSpeed's function"
        values = []
        for gather in (theirs, rank_loops.gather_with(init, theirs)):
            handle = gather(parameters)
            strided += isinstance(handle, rank_loops.StridedGather)
            handle.wait()
            handle.wait()  # DeepSpeed's coordinator waits once for every parameter
            values.append([parameter.detach().clone() for parameter in parameters])
            parameters[0].partition(parameters)
        for x, y, size in zip(*values, sizes, strict=True):
            assert x.shape == (size,)
            assert x.dtype == dtype
            assert torch.equal(x, y), (dtype, sizes)
    # DeepSpeed has no loop for a parameter on its own.
    assert strided == sum(len(sizes) > 1 for sizes in SIZES)


def steps(
    topology: groups.Topology, stage: int, precision: str, accumulation: int, more: dict[str, Any]
) -> list[torch.Tensor]:
    """Losses, norms, and this rank's weights, moments and teacher after three steps."""
    case = {"precision": precision, "accumulation": accumulation, "zero": {}}
    recipe = plan_worker.recipe_of(case, 3)
    # Buckets smaller than the model, and parameters that fill more than one.
    section: dict[str, Any] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": 40_000, **more}
    config = legal.deepspeed_config(recipe, {"zero_optimization": section}, 3, auto="fp32")
    torch.manual_seed(0)
    student, teacher = build_engines(recipe, config, topology)
    generator = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for number in range(3):
        batches: list[Batch] = [plan_worker.batch_of(generator, plan_worker.CLONES) for _ in range(accumulation)]
        result, seen = train_step(student, teacher, batches, recipe.objective, Draw(1, number), observe=False)
        found += [seen.loss, torch.as_tensor(result.norm)]
    for shard in student.shards():
        moment = shard.moment(student.optimizer, "exp_avg_sq")
        assert moment is not None
        found += [shard.weight.clone(), moment.clone()]
    found += [shard.values.clone() for shard in teacher.shards()]
    student.destroy()
    teacher.destroy()
    return found


def main() -> None:
    topology = groups.initialize(groups.ParallelConfig())
    theirs = stage3.reduce_scatter_coalesced
    assert rank_loops.replace(), "these tests are for the DeepSpeed that the replacements were written for"
    assert stage3.reduce_scatter_coalesced is not theirs
    for dtype in (torch.float32, torch.bfloat16):
        check_scatter(theirs, dtype)
        check_gather(topology, dtype)
    for precision, stage, accumulation in CASES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage3, "reduce_scatter_coalesced", theirs)
            patch.setattr(rank_loops, "_is_plain", lambda *_: False)
            own = {"reduce_scatter": True, "stage3_param_persistence_threshold": 1000}
            expected = steps(topology, stage, precision, accumulation, own)
        found = steps(topology, stage, precision, accumulation, {})
        assert all(torch.isfinite(x).all() for x in found)
        different = [number for number, (x, y) in enumerate(zip(found, expected, strict=True)) if not torch.equal(x, y)]
        assert not different, (precision, stage, accumulation, different)
    print("bitwise equal")
    groups.shutdown()


if __name__ == "__main__":
    main()
