"""Every key of `ds_keys.PROVEN` trains two ranks to the weights and checkpoints that the plain loop has without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import toy_model as toy
from launch import run_ranks

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.parallel.ds_check import accepted
from d2v_scale.parallel.ds_keys import INERT, PROVEN, REFUSED

WORKER = Path(__file__).with_name("engine_worker.py")
STEPS = toy.Settings().steps
CPU = {"device": "cpu", "pin_memory": False}
PINNED = {"device": "cpu", "pin_memory": True}
NONE = {"device": "none"}

# Small enough that several buckets, sub-groups and gathers are under way; and as large as people write them.
LOWER: dict[str, dict[str, Any]] = {
    "round robin z1": {"stage": 1, "round_robin_gradients": True, "contiguous_gradients": False},
    "round robin z2": {
        "stage": 2,
        "round_robin_gradients": True,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e6,
        "allgather_bucket_size": 5e8,
        "cpu_offload": False,
    },
    "round robin z2 offload": {
        "stage": 2,
        "round_robin_gradients": True,
        "cpu_offload": True,
        "reduce_scatter": False,
        "contiguous_gradients": False,
        "reduce_bucket_size": 60,
    },
    "aligned z1": {
        "stage": 1,
        "parameter_alignment": True,
        "allgather_bucket_size": 2,
        "reduce_bucket_size": 60,
        "use_multi_rank_bucket_allreduce": False,
        "overlap_comm": True,
    },
    "aligned round robin z2 offload": {
        "stage": 2,
        "parameter_alignment": True,
        "round_robin_gradients": True,
        "offload_optimizer": PINNED,
        "overlap_comm": True,
        "reduce_bucket_size": 60,
    },
    "aligned z1 offload": {"stage": 1, "parameter_alignment": True, "offload_optimizer": CPU},
    "spelt out z2": {
        "stage": 2,
        "parameter_alignment": False,
        "round_robin_gradients": False,
        "use_multi_rank_bucket_allreduce": True,
        "overlap_comm": False,
        "reduce_scatter": False,
        "offload_optimizer": NONE,
        "reduce_bucket_size": 60,
    },
    "one by one z2": {"stage": 2, "use_multi_rank_bucket_allreduce": False, "overlap_comm": None},
}
PARTITIONED: dict[str, dict[str, Any]] = {
    "smallest z3": {
        "stage": 3,
        "sub_group_size": 50,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "reduce_bucket_size": 60,
    },
    "persistent z3": {
        "stage": 3,
        "stage3_param_persistence_threshold": 100000,
        "stage3_model_persistence_threshold": 100,
        "stage3_use_all_reduce_for_fetch_params": True,
        "overlap_comm": True,
    },
    "in sequence z3": {
        "stage": 3,
        "stage3_allgather_sequential": True,
        "memory_efficient_linear": False,
        "override_module_apply": False,
        "enable_sanity_checks": True,
        "stage3_param_persistence_threshold": 10,
    },
    "spelt out z3": {
        "stage": 3,
        "stage3_allgather_sequential": False,
        "stage3_use_all_reduce_for_fetch_params": False,
        "memory_efficient_linear": True,
        "override_module_apply": True,
        "enable_sanity_checks": False,
        "round_robin_gradients": True,
        "offload_optimizer": NONE,
        "offload_param": NONE,
    },
    "sub-groups z3 offload optimizer": {"stage": 3, "sub_group_size": 50, "offload_optimizer": CPU},
    "z3 offload": {"stage": 3, "offload_optimizer": PINNED, "offload_param": PINNED, "sub_group_size": 1e9},
    "old switches z3": {
        "stage": 3,
        "cpu_offload": True,
        "cpu_offload_param": True,
        "cpu_offload_use_pin_memory": True,
        "max_live_parameters": 5e8,
        "max_reuse_distance": 5e8,
        "prefetch_bucket_size": 5e7,
        "param_persistence_threshold": 1e5,
        "sub_group_size": 50,
    },
    "offload params z3": {"stage": 3, "offload_param": CPU, "stage3_param_persistence_threshold": 0},
}
DTYPES: dict[str, dict[str, Any]] = {
    "fp32": {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}},
}
BF16: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 communication": {"communication_data_type": "bf16"},
    "fp32 communication": {"communication_data_type": "fp32"},
    "bf16 sums": {"data_types": {"grad_accum_dtype": "bf16"}},
}
VALUES: dict[str, Any] = {
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "steps_per_print": 1,
    "vocabulary_size": 32001,
    "log_level": "warning",
    "seq_parallel_communication_data_type": "bf16",
    "comms_logger.prof_ops": ["all_reduce"],
    "flops_profiler.recompute_fwd_factor": 1.0,
    "flops_profiler.module_depth": -1,
    "flops_profiler.profile_step": 2,
    "flops_profiler.top_modules": 1,
    "flops_profiler.output_file": "flops.txt",
    "csv_monitor.output_path": "csv",
    "csv_monitor.job_name": "job",
    "checkpoint.tag_validation": "Fail",
    "pipeline.partition": "best",
    "compile.passes": None,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": 0.5,
    # What needs a package that is not here, or another machine.
    "tensorboard.enabled": False,
    "wandb.enabled": False,
    "comet.enabled": False,
}


def inert(folder: Path) -> dict[str, Any]:
    """Every key that changes nothing, switched on as far as this machine can."""
    raw: dict[str, Any] = {}
    for key, (kind, _) in INERT.items():
        value = VALUES.get(key, True if kind.holds(True) else 3 if kind.holds(3) else "text")
        if key.endswith(("output_path", "output_file")):
            value = str(folder / value)
        *sections, name = key.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    # It waits for the process that it would stop.
    del raw["disable_python_gc"]
    return raw


def case(name: str, zero: dict[str, Any], **keys: Any) -> dict[str, Any]:
    stage = zero.get("stage", 2)
    return {"name": name, "stage": stage, "zero": zero, "steps": [0, STEPS], "accumulation": 2, **keys}


def train(folder: Path, cases: list[dict[str, Any]]) -> dict[str, Checkpoint]:
    """One launch; the checkpoint of each case."""
    for one in cases:
        one["out"] = str(folder / one["name"].replace(" ", "_"))
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    run_ranks(2, WORKER, str(listed), timeout=600)
    checkpoints = {one["name"]: find_newest_valid(Path(one["out"]))[0] for one in cases}
    assert all(checkpoints.values()), checkpoints
    return checkpoints  # type: ignore[return-value]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """What was trained with each key."""
    cases = [case("without", {"stage": 1})]
    cases += [case(name, zero) for name, zero in {**LOWER, **PARTITIONED}.items()]
    cases += [case(name, {"stage": 2}, json=raw) for name, raw in DTYPES.items()]
    cases += [case(name, {"stage": 2}, json=raw, precision="bf16") for name, raw in BF16.items()]
    return train(tmp_path_factory.mktemp("keys"), cases)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """What was trained with everything that only reports, and all else that changes nothing."""
    folder = tmp_path_factory.mktemp("inert")
    said = inert(folder)
    for name in ("offload_optimizer", "offload_param"):
        said["zero_optimization"][name] |= {"device": "none"}
    lower = {key: value for key, value in said["zero_optimization"].items() if key != "offload_param"}
    zeros = {"z1": {**lower, "stage": 1}, "z3": {**said["zero_optimization"], "stage": 3}}
    return train(
        folder, [case("without", {"stage": 1}), *(case(name, zero, json=said) for name, zero in zeros.items())]
    )


def largest_difference(found: Checkpoint, expected: Checkpoint) -> dict[str, float]:
    """By kind: student, both moments, teacher."""
    differences = {}
    for kind in expected.kinds():
        assert set(found.names(kind)) == set(expected.names(kind))
        pairs = [(found.tensor(kind, name), expected.tensor(kind, name)) for name in expected.names(kind)]
        differences[kind] = max(float((a - b).abs().max()) for a, b in pairs)
    return differences


@pytest.mark.parametrize("name", [*LOWER, *PARTITIONED, *DTYPES])
def test_training_and_checkpoint_are_those_without_the_key(found: dict[str, Checkpoint], name: str) -> None:
    equal_to_the_plain_loop(found[name], found["without"])


@pytest.mark.parametrize("name", ["z1", "z3"])
def test_what_changes_nothing_changes_nothing(reported: dict[str, Checkpoint], name: str) -> None:
    equal_to_the_plain_loop(reported[name], reported["without"])


def equal_to_the_plain_loop(ours: Checkpoint, without: Checkpoint) -> None:
    expected = toy.reference(toy.Settings())
    assert ours.extra["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert ours.extra["norms"] == pytest.approx(expected["norms"], rel=2e-6)
    assert set(ours.kinds()) == {"student", "exp_avg", "exp_avg_sq", "teacher"}
    assert max(largest_difference(ours, without).values()) < 2e-6
    for kind in ("student", "teacher"):
        for tensor in ours.names(kind):
            assert float((ours.tensor(kind, tensor) - expected[kind][tensor]).abs().max()) < 2e-6, tensor


@pytest.mark.parametrize("name", [name for name in BF16 if name != "bf16"])
def test_dtypes_of_gradients_differ_by_their_rounding_only(found: dict[str, Checkpoint], name: str) -> None:
    ours, without = found[name], found["bf16"]
    assert ours.extra["losses"] == pytest.approx(without.extra["losses"], rel=2e-2)
    # A rate of 0.01 and six steps: no weight can be further away than where every sign is another.
    assert largest_difference(ours, without)["student"] < 3e-2


def test_every_proven_key_is_tried_with_every_kind_of_value() -> None:
    tried: dict[str, list[Any]] = {}

    def collect(section: dict[str, Any], path: str) -> None:
        for key, value in section.items():
            if isinstance(value, dict):
                collect(value, f"{path}{key}.")
            else:
                tried.setdefault(path + key, []).append(value)

    for zero in (*LOWER.values(), *PARTITIONED.values()):
        collect(accepted({"zero_optimization": zero}), "")
    for raw in (*DTYPES.values(), *BF16.values()):
        collect(raw, "")
    assert PROVEN.keys() <= tried.keys(), PROVEN.keys() - tried.keys()
    switches = [key for key, kind in PROVEN.items() if kind.holds(True)]
    assert {key for key in switches if set(tried[key]) != {True, False}} == set()
    assert set(tried["zero_optimization.stage"]) == {1, 2, 3}
    assert not PROVEN.keys() & REFUSED.keys()
