"""Which keys a DeepSpeed JSON may have. DeepSpeed itself passes over a misspelt one, or says so after the start."""

import difflib
from typing import Any

from d2v_scale.errors import ConfigError

_NUMBERS_AND_SWITCHES = """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping
    managed_gradient_accumulation communication_data_type seq_parallel_communication_data_type prescale_gradients
    gradient_predivide_factor gradient_allreduce_op disable_allgather disable_python_gc dump_state steps_per_print
    wall_clock_breakdown memory_breakdown dataloader_drop_last log_level use_data_before_expert_parallelism
    vocabulary_size zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
"""

_SECTIONS = """
    bf16 fp16 zero_optimization pipeline tensor_parallel data_types activation_checkpointing checkpoint compile
    timers comms_logger flops_profiler tensorboard wandb csv_monitor comet autotuning aio datastates_ckpt
"""

# Refused with a reason of their own by `ds_config`.
_OF_ANOTHER_OWNER = """
    optimizer scheduler amp torch_autocast elasticity curriculum_learning data_efficiency compression_training
    quantize_training weight_quantization sparse_gradients sparse_attention progressive_layer_drop hybrid_engine
    expert_parallel
"""

_ZERO = """
    stage allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
    cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
    gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights
    log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear
    model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm
    override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint
    prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory
    stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
    stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
    stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
    use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights
"""

_OFFLOAD_OPTIMIZER = """
    device buffer_count cpuadam_cores_perc fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
    super_offload
"""
_OFFLOAD_PARAM = """
    device buffer_count buffer_size max_in_cpu nvme_path pin_memory
"""
_OFFLOAD = {"offload_optimizer": _OFFLOAD_OPTIMIZER, "offload_param": _OFFLOAD_PARAM}


def check_keys(raw: dict[str, Any]) -> None:
    """Raises ConfigError for a key that DeepSpeed does not know, with the nearest one, and for a section that is no
    object."""
    _check_names(raw, _NUMBERS_AND_SWITCHES + _SECTIONS + _OF_ANOTHER_OWNER)
    for name in _SECTIONS.split():
        _check_object(name, raw.get(name, {}))
    zero = raw.get("zero_optimization", {})
    _check_names(zero, _ZERO, "zero_optimization.")
    for name, names in _OFFLOAD.items():
        # Here null is DeepSpeed's own word for none.
        if zero.get(name) is not None:
            path = f"zero_optimization.{name}"
            _check_object(path, zero[name])
            _check_names(zero[name], names, f"{path}.")


def _check_names(section: dict[str, Any], names: str, path: str = "") -> None:
    known = names.split()
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            remedy = f"Did you mean {path + near[0]!r}?" if near else "Remove it from the JSON."
            raise ConfigError(path + key, "is not a key of DeepSpeed's configuration", remedy)


def _check_object(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ConfigError(key, f"is {value!r} in the DeepSpeed JSON", "Give an object ({...}), or leave the key out.")
