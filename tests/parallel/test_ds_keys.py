"""The tables have every key that the installed DeepSpeed knows, and no key twice."""

import inspect
import re
from typing import Any

import pytest
from deepspeed.autotuning import config as autotuning
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor import config as monitor
from deepspeed.profiling import config as profiling
from deepspeed.runtime import config as runtime
from deepspeed.runtime import precision_config
from deepspeed.runtime.activation_checkpointing import config as activations
from deepspeed.runtime.model_checkpointing import config as checkpoints
from deepspeed.runtime.swap_tensor import aio_config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero import config as zero
from deepspeed.runtime.zero import offload_config
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

from d2v_scale.parallel.ds_keys import INERT, LEAVES, PROVEN, RECIPES, REFUSED, SECTIONS

MODELS: dict[str, Any] = {
    "zero_optimization": zero.DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
    "bf16": precision_config.DeepSpeedBF16Config,
    "fp16": precision_config.DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "tensorboard": monitor.TensorBoardConfig,
    "wandb": monitor.WandbConfig,
    "csv_monitor": monitor.CSVConfig,
    "comet": monitor.CometConfig,
    "tensor_parallel": TPTrainingConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}

SOURCES: dict[str, Any] = {
    "activation_checkpointing": activations.DeepSpeedActivationCheckpointingConfig._initialize,
    "flops_profiler": profiling.DeepSpeedFlopsProfilerConfig._initialize,
    "aio": aio_config.get_aio_config,
    "checkpoint": checkpoints.get_checkpoint_config,
}
"""Sections without a model: the function that reads them, with constants for keys."""


def is_known(key: str) -> bool:
    return key in LEAVES or key in SECTIONS


@pytest.mark.parametrize("section", MODELS)
def test_every_key_of_deepspeeds_models_is_in_a_table(section: str) -> None:
    fields = MODELS[section].model_fields
    names = {name for key, field in fields.items() for name in (key, field.alias) if name}
    assert {name for name in names if not is_known(f"{section}.{name}")} == set()


@pytest.mark.parametrize("section", SOURCES)
def test_every_key_that_deepspeed_reads_in_a_section_is_in_a_table(section: str) -> None:
    function = SOURCES[section]
    names = _constants(function) - {section}
    assert len(names) >= 3
    assert {name for name in names if not is_known(f"{section}.{name}")} == set()


def test_every_key_that_deepspeed_reads_at_the_top_is_in_a_table() -> None:
    """Its own reader has no model: each function `get_...(param_dict)` of it reads a key by a constant."""
    readers = [function for name, function in vars(runtime).items() if name.startswith("get_") and callable(function)]
    names = {name for reader in readers if reader.__module__ == runtime.__name__ for name in _constants(reader)}
    names |= set(runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    names |= set(_text_keys(runtime.DeepSpeedConfig._initialize_params))
    inner = {"type", "params", "enabled", "dtype", "lower_precision_safe_modules", "max_grad_norm", "legacy_fusion"}
    inner |= {"load_universal", "use_node_local_storage", "tag_validation", "parallel_write", "pipeline_stage"}
    inner |= {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}
    found = names - inner
    assert {"train_batch_size", "zero_force_ds_cpu_optimizer", "weight_quantization", "compile"} <= found
    assert {name for name in found if not is_known(name)} == set()
    assert {f"zero_optimization.{name}" for name in runtime._REMOVED_ZERO_CONFIG_KEYS} <= REFUSED.keys()


def test_every_pipeline_key_is_in_a_table() -> None:
    assert {name for name in runtime.get_pipeline_config({}) if not is_known(f"pipeline.{name}")} == set()


def test_whole_sections_are_refused_where_their_keys_are_not_listed() -> None:
    assert autotuning.AUTOTUNING in REFUSED
    assert {"data_efficiency", "hybrid_engine", "expert_parallel", "zero_optimization.zenflow"} <= REFUSED.keys()


def test_no_key_is_in_two_tables() -> None:
    tables = (PROVEN, INERT, REFUSED, RECIPES)
    assert sum(map(len, tables)) == len({key for table in tables for key in table})
    assert not SECTIONS & LEAVES, "a section that is refused has no keys of its own"


def test_every_reason_says_something() -> None:
    assert all(len(why) > 8 for _, why in (*INERT.values(), *REFUSED.values()))


def _constants(function: Any) -> set[str]:
    """The strings behind the capital names that a function looks up."""
    names = {name for name in function.__code__.co_names if re.fullmatch(r"[A-Z0-9_]+", name)}
    values = {name: function.__globals__.get(name) for name in names if not name.endswith(("_DEFAULT", "_DICT"))}
    defaults = (value for value in function.__defaults__ or () if isinstance(value, str))
    return {
        value for value in (*values.values(), *defaults) if isinstance(value, str) and re.fullmatch(r"[a-z]\w+", value)
    }


def _text_keys(function: Any) -> list[str]:
    """Keys that the source of a function has in quotes."""
    source = inspect.getsource(function)
    return re.findall(r"param_dict(?:\.get\(|\[)'(\w+)'", source)
