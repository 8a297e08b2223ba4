from typing import Any

import pytest

from d2v_scale.errors import ConfigError
from d2v_scale.parallel import ds_keys
from d2v_scale.parallel.ds_keys import check_keys


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
    ],
)
def test_a_misspelt_key_is_refused_with_the_one_that_was_meant(raw: dict[str, Any], key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_keys(raw)
    assert caught.value.key == key
    assert f"Did you mean {meant!r}?" in str(caught.value)


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16", "pipeline", "data_types", "tensor_parallel"])
@pytest.mark.parametrize("value", [None, "auto", 3, []])
def test_a_section_that_is_no_object_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        check_keys({name: value})
    assert caught.value.key == name
    assert repr(value) in str(caught.value)


def test_what_deepspeed_reports_about_a_run_is_accepted() -> None:
    check_keys(
        {
            "steps_per_print": 10,
            "wall_clock_breakdown": True,
            "vocabulary_size": 32000,
            "flops_profiler": {"enabled": True},
            "comms_logger": {"enabled": True, "verbose": False},
            "tensorboard": {"enabled": True, "output_path": "tb"},
            "activation_checkpointing": {"profile": True},
            "zero_optimization": {"stage": 1, "offload_optimizer": None},
        }
    )


def test_the_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero import config, offload_config

    def fields(model: Any) -> set[str]:
        return {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}

    for model, names in (
        (config.DeepSpeedZeroConfig, ds_keys._ZERO),
        (offload_config.DeepSpeedZeroOffloadOptimizerConfig, ds_keys._OFFLOAD["offload_optimizer"]),
        (offload_config.DeepSpeedZeroOffloadParamConfig, ds_keys._OFFLOAD["offload_param"]),
    ):
        assert fields(model) <= set(names.split())
