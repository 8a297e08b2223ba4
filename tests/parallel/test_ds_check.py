import math
from typing import Any

import pytest

from d2v_scale import command_line
from d2v_scale.errors import ConfigError
from d2v_scale.parallel.ds_check import accepted
from d2v_scale.parallel.ds_keys import INERT, PROVEN, RECIPES, REFUSED
from d2v_scale.planning import legal

ZERO = {"stage": 1}


@pytest.mark.parametrize(
    ("raw", "key", "meant"),
    [
        ({"gradient_acumulation_steps": 4}, "gradient_acumulation_steps", "gradient_accumulation_steps"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation", "zero_optimization"),
        (
            {"zero_optimization": {"stage3_max_live_params": 1}},
            "zero_optimization.stage3_max_live_params",
            "zero_optimization.stage3_max_live_parameters",
        ),
        (
            {"zero_optimization": {"offload_param": {"pinned_memory": True}}},
            "zero_optimization.offload_param.pinned_memory",
            "zero_optimization.offload_param.pin_memory",
        ),
        ({"comms_logger": {"enable": True}}, "comms_logger.enable", "comms_logger.enabled"),
        ({"timers": {"throughput": {"synchronised": True}}}, "timers.throughput.synchronised", "synchronized"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(raw: dict[str, Any], key: str, meant: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean") as caught:
        accepted(raw)
    assert caught.value.key == key
    assert f"{meant}'?" in str(caught.value)


@pytest.mark.parametrize("raw", [{"_": 1}, {"monitor_config": {}}, {"tensorboard": {"flush_secs": 3}}])
def test_a_key_that_is_in_no_table_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is not a key of DeepSpeed's configuration that is known to be right here"):
        accepted(raw)


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16", "pipeline", "data_types", "tensor_parallel"])
@pytest.mark.parametrize(("value", "words"), [(None, "null"), ("auto", '"auto"'), (3, "3"), ([], "[]")])
def test_a_section_that_is_no_object_is_refused_by_name(name: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted({name: value})
    assert caught.value.key == name
    assert f"is {words} in the DeepSpeed JSON" in str(caught.value)


def nested(key: str, value: object) -> dict[str, Any]:
    """The JSON in which `value` is at this path."""
    *sections, name = key.split(".")
    raw: dict[str, Any] = {name: value}
    for section in reversed(sections):
        raw = {section: raw}
    return raw


KINDS = {**PROVEN, **RECIPES, **{key: kind for key, (kind, _) in INERT.items()}}


@pytest.mark.parametrize("key", [key for key, kind in KINDS.items() if kind.says.startswith("true or false")])
@pytest.mark.parametrize("value", ["false", 1, 0.0, []])
def test_a_switch_is_true_or_false(key: str, value: object) -> None:
    assert accepted(nested(key, True)) == nested(key, True)
    assert accepted(nested(key, False)) == nested(key, False)
    with pytest.raises(ConfigError, match="true or false") as caught:
        accepted(nested(key, value))
    assert caught.value.key == key


@pytest.mark.parametrize("key", [key for key, kind in KINDS.items() if "number" in kind.says])
@pytest.mark.parametrize("value", ["500000000", True, [], math.nan, {}])
def test_a_number_is_a_number(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted(nested(key, value))
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.reduce_bucket_size", 0),
        ("zero_optimization.reduce_bucket_size", 1.5),
        ("zero_optimization.allgather_bucket_size", 7),
        ("zero_optimization.stage3_max_live_parameters", -1),
        ("zero_optimization.offload_param.device", "nvme"),
        ("zero_optimization.offload_param.device", "auto"),
        ("zero_optimization.stage", "auto"),
        ("zero_optimization.zero_hpz_partition_size", True),
        ("steps_per_print", 0),
        ("seq_parallel_communication_data_type", "fp8"),
        ("log_level", "loud"),
        ("bf16.check_grad_overflow", False),
        ("gradient_predivide_factor", True),
        ("tensor_parallel.tp", {"tp_size": 2}),
        ("pipeline.activation_checkpoint_interval", 1),
        ("checkpoint.writer", {"type": "fast"}),
        ("compile.deepcompile", True),
        ("sequence_parallel_size", 2),
        ("autotuning", {"enabled": True}),
        ("nebula", {"enabled": True}),
        ("bfloat16", {"enabled": True}),
        ("zero_optimization.round_robin_gradients", "true"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.leaf_module", {"names": ["blocks"]}),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
    ],
)
def test_values_matter_not_only_keys(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted(nested(key, value))
    assert caught.value.key == key


def test_what_changes_nothing_may_be_written_out_and_is_left_out() -> None:
    for key, (neutral, _) in REFUSED.items():
        for value in (*neutral, "auto", {"enabled": False}):
            raw = accepted(nested(key, value))
            while raw and isinstance(raw, dict):
                (raw,) = raw.values()
            assert raw == {}, key


def test_auto_is_as_if_left_out() -> None:
    assert accepted({"steps_per_print": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}) == {
        "zero_optimization": {"stage": 2}
    }


def test_second_names_and_old_switches_are_read_as_what_they_stand_for() -> None:
    said = accepted({"zero_optimization": {"stage": 3, "max_live_parameters": 5e8, "cpu_offload": True}})
    assert said["zero_optimization"] == {
        "stage": 3,
        "stage3_max_live_parameters": 5e8,
        "offload_optimizer": {"device": "cpu"},
    }
    both = {"cpu_offload": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert accepted({"zero_optimization": both}) == {
        "zero_optimization": {"offload_optimizer": both["offload_optimizer"]}
    }
    for contradiction in (
        {"cpu_offload": False, "offload_optimizer": {"device": "cpu"}},
        {"cpu_offload_param": True, "offload_param": {"device": "none"}},
        {"max_live_parameters": 1, "stage3_max_live_parameters": 2},
    ):
        with pytest.raises(ConfigError, match="Leave zero_optimization"):
            accepted({"zero_optimization": contradiction})


HF_ZERO_3 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The template for Hugging Face's Trainer."""

AIO = {"block_size": 1048576, "queue_depth": 8, "thread_count": 1, "single_submit": False, "overlap_events": True}
DEMO_BATCH = 64


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, None),
        ({"fp16": {"enabled": False}}, None),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"fp16": None}, "fp16"),
        ({"bf16": None}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"zero_optimization.stage": "3"}, "zero_optimization.stage"),
        ({"zero_optimization.stage": "auto"}, "zero_optimization.stage"),
        ({"steps_per_print": math.inf}, None),
        ({"zero_optimization.cpu_offload": True}, None),  # it says what offload_optimizer says
        ({"zero_optimization.cpu_offload": False}, "zero_optimization.cpu_offload"),  # it says the contrary
        ({"zero_optimization.cpu_offload": False, "zero_optimization.offload_optimizer": None}, None),
        ({"data_types": None}, "data_types"),
        ({"train_micro_batch_size_per_gpu": 16}, "train_micro_batch_size_per_gpu"),
        ({"train_batch_size": DEMO_BATCH, "train_micro_batch_size_per_gpu": DEMO_BATCH}, None),
        ({"train_batch_size": float(DEMO_BATCH)}, None),
        ({"gradient_clipping": 3}, None),
        ({"gradient_clipping": 1}, "gradient_clipping"),
        ({"zero_optimization.zero_hpz_partition_size": 8}, "zero_optimization.zero_hpz_partition_size"),
        ({"zero_optimization.zero_hpz_partition_size": "auto"}, None),
        ({"zero_optimization.offload_optimizer": {"device": "auto"}}, "zero_optimization.offload_optimizer.device"),
        ({"zero_optimization.offload_optimizer": "cpu"}, "zero_optimization.offload_optimizer"),
        ({"zero_optimization.stage3_gather_fp16_weights_on_model_save": True}, None),
        ({"zero_optimization.zero_quantized_weights": "auto"}, None),
        ({"zero_optimization.zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights"),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        ({"aio": AIO}, None),
        ({"_comment": "x"}, "_comment"),
        ({"zero_force_ds_cpu_optimizer": False}, None),
        ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"zero_optimization.overlap_comm": "auto"}, None),
        ({"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}, None),
        ({"monitor_config": {"enabled": True}}, "monitor_config"),
        ({"load_universal_checkpoint": True}, "load_universal_checkpoint"),
        ({"checkpoint": {"load_universal": True, "use_node_local_storage": True}}, None),
        ({"nebula": {"enabled": False}}, None),
        ({"eigenvalue": {"enabled": False}}, None),
        ({"fp32_allreduce": False}, "fp32_allreduce"),
        ({"sequence_parallel_size": 1}, None),
        ({"zero_optimization.mics_shard_size": -1}, None),
        ({"zero_optimization.mics_shard_size": 8}, "zero_optimization.mics_shard_size"),
        ({"zero_optimization.loco_param": None}, "zero_optimization.loco_param"),
        ({"prescale_gradients": "false"}, "prescale_gradients"),
        ({"zero_optimization.round_robin_gradients": True}, None),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type"),
        ({"optimizer": "auto"}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, None),  # a type alone is Trainer's template
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type"),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3}}},
            "scheduler.params.warmup_num_steps",
        ),
    ],
    ids=str,
)
def test_deepspeed_jsons_as_people_have_them(changes: dict[str, Any], refused: str | None) -> None:
    """Through what training asks before it starts: accepted, or refused with the key that is wrong."""
    raw = {**HF_ZERO_3, "zero_optimization": dict(HF_ZERO_3["zero_optimization"])}  # type: ignore[call-overload]
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (raw[section] if section else raw)[name] = value
    recipe, _ = command_line.parse(["--recipe", "demo_vision"])
    assert recipe.global_batch_size == DEMO_BATCH
    if refused is None:
        legal.deepspeed_config(recipe, raw, 1, auto="fp32")
        return
    with pytest.raises(ConfigError) as caught:
        legal.deepspeed_config(recipe, raw, 1, auto="fp32")
    assert caught.value.key == refused
