"""Which keys a DeepSpeed JSON may have, and with which values.

No key is accepted because DeepSpeed knows its name. Each is in one of four tables: `PROVEN`, `INERT`, `REFUSED`, or
`RECIPES` for what the recipe decides; a key that is in none is refused. Paths are dotted.
"""

from typing import Any

from d2v_scale.parallel.ds_values import (
    COUNT,
    EVEN_COUNT,
    LIST,
    NUMBER,
    POSITIVE,
    PRINT_EVERY,
    SECTION,
    SHARE,
    SWITCH,
    TEXT,
    Kind,
    one_of,
    or_null,
)

_DTYPES = one_of("fp32", "bf16", "fp16")
_DEVICE = one_of("none", "cpu")  # The EMA teacher and the checkpoints read the values from memory.


def _keys(path: str, kind: Kind, names: str) -> dict[str, Kind]:
    return {f"{path}{name}": kind for name in names.split()}


PROVEN: dict[str, Kind] = {
    "zero_optimization.stage": Kind("the number 1, 2 or 3", one_of(0, 1, 2, 3).holds),
    **_keys(
        "zero_optimization.",
        SWITCH,
        """
        contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce round_robin_gradients parameter_alignment
        memory_efficient_linear override_module_apply enable_sanity_checks stage3_use_all_reduce_for_fetch_params
        stage3_allgather_sequential offload_optimizer.pin_memory offload_param.pin_memory
        """,
    ),
    "zero_optimization.overlap_comm": or_null(SWITCH),
    "zero_optimization.reduce_bucket_size": POSITIVE,
    "zero_optimization.allgather_bucket_size": EVEN_COUNT,
    "zero_optimization.sub_group_size": POSITIVE,
    **_keys(
        "zero_optimization.stage3_",
        COUNT,
        """
        prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
        max_reuse_distance
        """,
    ),
    "zero_optimization.offload_optimizer.device": _DEVICE,
    "zero_optimization.offload_param.device": _DEVICE,
    "communication_data_type": or_null(_DTYPES),
    "data_types.grad_accum_dtype": or_null(_DTYPES),
}
"""Tests train with and without each of these on two ranks: losses and checkpoints are equal."""

ONLY_REPORTS = "it only reports"
_NVME = "it is of NVMe offload, which is refused"
_OWN_CHECKPOINTS = "DeepSpeed's own checkpoints are not used"
_FP16 = "fp16 is off"
_OTHER_CHECKPOINTING = "model.activation_checkpointing recomputes blocks with torch"
_NOT_COMPILED = "DeepSpeed compiles nothing; model.compile does"
_OWN_STAGES = "the model is cut into stages by its own costs"

INERT: dict[str, tuple[Kind, str]] = {}
"""What changes no value here, and why. Tests switch on together all that the machine at hand can run."""


def _inert(path: str, why: str, kind: Kind, names: str) -> None:
    INERT.update(dict.fromkeys(_keys(path, kind, names), (kind, why)))


_inert("", ONLY_REPORTS, SWITCH, "wall_clock_breakdown memory_breakdown dump_state")
_inert("", ONLY_REPORTS, or_null(PRINT_EVERY), "steps_per_print")
_inert("", ONLY_REPORTS, or_null(COUNT), "vocabulary_size")
_inert("", ONLY_REPORTS, or_null(one_of("debug", "info", "warning", "error", "critical")), "log_level")
_inert("", "no loader of DeepSpeed's is used", SWITCH, "dataloader_drop_last")
_inert("", "DeepSpeed 0.19 reads it nowhere", SWITCH, "disable_allgather zero_optimization.allgather_partitions")
_inert("", "it is about when Python collects garbage", SWITCH, "disable_python_gc")
_inert("", "the optimizer is torch's AdamW, which is allowed", SWITCH, "zero_allow_untested_optimizer")
_inert("", "the model has no experts", SWITCH, "use_data_before_expert_parallelism")
_inert("", "sequences are not divided", or_null(_DTYPES), "seq_parallel_communication_data_type")
_inert("timers.throughput.", ONLY_REPORTS, SWITCH, "enabled synchronized")
_inert("comms_logger.", ONLY_REPORTS, SWITCH, "enabled prof_all verbose debug")
_inert("comms_logger.", ONLY_REPORTS, LIST, "prof_ops")
_inert("flops_profiler.", ONLY_REPORTS, SWITCH, "enabled detailed")
_inert("flops_profiler.", ONLY_REPORTS, NUMBER, "recompute_fwd_factor module_depth")
_inert("flops_profiler.", ONLY_REPORTS, COUNT, "profile_step top_modules")
_inert("flops_profiler.", ONLY_REPORTS, or_null(TEXT), "output_file")
for _monitor in ("tensorboard.", "csv_monitor.", "wandb.", "comet."):
    _inert(_monitor, ONLY_REPORTS, SWITCH, "enabled")
for _monitor in ("tensorboard.", "csv_monitor."):
    _inert(_monitor, ONLY_REPORTS, TEXT, "output_path job_name")
_inert("wandb.", ONLY_REPORTS, or_null(TEXT), "group team project")
_inert("comet.", ONLY_REPORTS, COUNT, "samples_log_interval")
_inert("comet.", ONLY_REPORTS, or_null(TEXT), "project workspace api_key experiment_name experiment_key mode")
_inert("comet.", ONLY_REPORTS, or_null(SWITCH), "online")
_inert("fp16.", _FP16, SWITCH, "auto_cast consecutive_hysteresis fp16_master_weights_and_grads")
_inert("fp16.", _FP16, NUMBER, "loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale")
_inert("bf16.", "it is of an optimizer that is not used", SWITCH, "immediate_grad_update")
_inert("activation_checkpointing.", _OTHER_CHECKPOINTING, or_null(COUNT), "number_checkpoints")
_inert(
    "activation_checkpointing.",
    _OTHER_CHECKPOINTING,
    SWITCH,
    "partition_activations contiguous_memory_optimization cpu_checkpointing profile synchronize_checkpoint_boundary",
)
_inert("checkpoint.", _OWN_CHECKPOINTS, TEXT, "tag_validation")
_inert("checkpoint.", _OWN_CHECKPOINTS, SWITCH, "checkpoint_serialization load_universal use_node_local_storage")
_inert("checkpoint.parallel_write.", _OWN_CHECKPOINTS, SWITCH, "pipeline_stage")
_inert(
    "zero_optimization.",
    _OWN_CHECKPOINTS,
    SWITCH,
    """
    load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint stage3_gather_16bit_weights_on_model_save
    """,
)
_inert("zero_optimization.", ONLY_REPORTS, SWITCH, "log_trace_cache_warnings")
_inert("zero_optimization.", "DeepSpeed's own Muon is not used", SWITCH, "save_muon_momentum_buffer_in_memory")
_inert("zero_optimization.", "DeepSpeed 0.19 reads it nowhere", or_null(SWITCH), "cpu_offload_use_pin_memory")
_inert("zero_optimization.offload_optimizer.", _NVME, or_null(TEXT), "nvme_path")
_inert("zero_optimization.offload_optimizer.", _NVME, SWITCH, "pipeline_read pipeline_write fast_init")
_inert("zero_optimization.offload_optimizer.", _NVME, COUNT, "buffer_count")
_inert("zero_optimization.offload_optimizer.", "it is of super_offload, which is refused", SHARE, "cpuadam_cores_perc")
_inert("zero_optimization.offload_param.", _NVME, or_null(TEXT), "nvme_path")
_inert("zero_optimization.offload_param.", _NVME, COUNT, "buffer_count buffer_size max_in_cpu")
_inert("aio.", _NVME, COUNT, "block_size queue_depth intra_op_parallelism thread_count")
_inert("aio.", _NVME, SWITCH, "single_submit overlap_events")
_inert("pipeline.", _OWN_STAGES, TEXT, "partition")
_inert("pipeline.", _OWN_STAGES, SWITCH, "seed_layers use_reentrant")
_inert(
    "compile.",
    _NOT_COMPILED,
    SWITCH,
    """
    autoep_non_moe free_activation offload_activation offload_activation_pin_memory offload_opt_states double_buffer
    symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather
    sync_after_allgather keep_int_input_tensors keep_all_input_tensors
    """,
)
_inert("compile.", _NOT_COMPILED, COUNT, "free_activation_threshold")
_inert("compile.", _NOT_COMPILED, or_null(LIST), "passes")

_FOLLOW = "the teacher could not follow the student exactly"
_DIVISION = "the loss is divided by what was masked in the whole step"
_DATA = "the data plan is the recipe's"
_PRECISION = "precision is the recipe's"
_MASTER = "master weights and moments are fp32"
_SLICES = "blocks are tensor parallel by parallel.tensor"
_REMOVED = "DeepSpeed 0.19 has removed it"
_UNITS = "the backward pass fails where it takes hold: units are reduced before their gradients are there"
_UNPROVEN = "nobody has shown that checkpoints stay right with it"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "zero_optimization.zero_hpz_partition_size": ((1,), "the secondary copies of the weights make the teacher stale"),
    "zero_optimization.zero_quantized_weights": ((False,), _FOLLOW),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _FOLLOW),
    "zero_optimization.zero_quantized_gradients": ((False,), "the gradient would not be the one of the loss"),
    "zero_optimization.compute_grad_norm": ((True,), "the gradient norm carries the verdict on the step"),
    "zero_optimization.ignore_unused_parameters": ((True,), "a step of one modality leaves the other stems out"),
    "zero_optimization.legacy_stage1": ((False,), _REMOVED),
    "zero_optimization.zenflow": ((None,), "it steps with the gradients of other steps"),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), _UNITS),
    "zero_optimization.module_granularity_threshold": ((0,), _UNITS),
    "zero_optimization.leaf_module": ((None, {}), "which modules are gathered as one is the model's"),
    "zero_optimization.mics_shard_size": ((-1,), _REMOVED),
    "zero_optimization.mics_hierarchical_params_gather": ((False,), _REMOVED),
    "zero_optimization.zeropp_loco_param": ((None,), _REMOVED),
    "zero_optimization.offload_optimizer.ratio": ((1,), "it makes a second optimizer, which checkpoints do not hold"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _UNPROVEN),
    "bf16.check_grad_overflow": ((True,), "a step that is not finite must not be taken"),
    "bf16.bf16_master_weights_and_grads": ((False,), _MASTER),
    "bf16.bf16_optimizer_states": ((False,), _MASTER),
    "bfloat16": ((), "it is the old name of bf16"),
    "managed_gradient_accumulation": ((True,), "a step has as many micro-batches as the recipe says"),
    "prescale_gradients": ((False, None), _DIVISION),
    "gradient_predivide_factor": ((1, None), _DIVISION),
    "gradient_allreduce_op": (("mean", None), _DIVISION),
    "sparse_gradients": ((False, None), "gradients are dense"),
    "zero_force_ds_cpu_optimizer": ((False,), "the recipe's `optim` section makes the optimizer"),
    "sequence_parallel_size": ((1,), "sequences are not divided"),
    "data_types.param_dtype": ((None,), _PRECISION),
    "data_types.buffer_dtype": ((None,), _PRECISION),
    "data_types.keep_in_fp32_modules": ((None, []), _PRECISION),
    "aio.use_gds": ((False,), _NVME),
    "pipeline.pipe_partitioned": ((False,), "more than one tensor with a gradient travels between the stages"),
    "pipeline.grad_partitioned": ((False,), "more than one tensor with a gradient travels between the stages"),
    "pipeline.activation_checkpoint_interval": ((0,), _OTHER_CHECKPOINTING),
    "checkpoint.writer": ((None,), _OWN_CHECKPOINTS),
    "compile.deepcompile": ((False,), "it reduces gradients in compiled code, which checkpoints do not know"),
    "tensor_parallel.autotp_size": ((0, 1), _SLICES),
    **dict.fromkeys(
        _keys(
            "tensor_parallel.",
            SECTION,
            """
            dtype tensor_parallel tp injection_policy_tuple partition_config preset_model vocab_parallel_lm_head
            """,
        ),
        ((None,), _SLICES),
    ),
    **dict.fromkeys(
        _keys(
            "tensor_parallel.", SWITCH, "tp_overlap_comm keep_module_on_host replace_with_kernel_inject kernel_inject"
        ),
        ((False,), _SLICES),
    ),
    "tensor_parallel.vocab_parallel_ce_backend": (("torch",), _SLICES),
    "datastates_ckpt": ((None, False), _OWN_CHECKPOINTS),
    "graph_harvesting": ((False, None), _REMOVED),
    "amp": ((None,), _PRECISION),
    "torch_autocast": ((None,), _PRECISION),
    "elasticity": ((None,), "the global batch size is the recipe's at any world size"),
    "curriculum_learning": ((None,), _DATA),
    "data_efficiency": ((None,), _DATA),
    "compression_training": ((None,), "the teacher follows the whole weights"),
    "quantize_training": ((None,), "the teacher follows the whole weights"),
    "weight_quantization": ((None,), "the teacher follows the whole weights"),
    "sparse_attention": ((None,), "attention is the model's"),
    "progressive_layer_drop": ((None,), "the recipe's model.backbone.layer_drop skips blocks"),
    "hybrid_engine": ((None,), "the model generates nothing"),
    "expert_parallel": ((None,), "the model has no experts"),
    "autotuning": ((None,), "it ends the run to try settings; `d2v plan` finds them"),
    "nebula": ((None,), _REMOVED),
    "eigenvalue": ((None,), _REMOVED),
}
"""With the values that change nothing, which may be written out and are left out; a section also switched off."""

RECIPES: dict[str, Kind] = {
    "train_batch_size": POSITIVE,
    "train_micro_batch_size_per_gpu": POSITIVE,
    "gradient_accumulation_steps": POSITIVE,
    "gradient_clipping": NUMBER,
    "bf16.enabled": SWITCH,
    "fp16.enabled": or_null(SWITCH),
    "pipeline.stages": POSITIVE,
    "optimizer.type": TEXT,
    "optimizer.legacy_fusion": SWITCH,
    **_keys("optimizer.params.", NUMBER, "lr eps weight_decay max_grad_norm"),
    **_keys("optimizer.params.", SWITCH, "torch_adam adam_w_mode bias_correction amsgrad fused"),
    "optimizer.params.betas": LIST,
    "scheduler.type": TEXT,
    **_keys("scheduler.params.", NUMBER, "warmup_min_lr warmup_max_lr warmup_num_steps total_num_steps"),
    **_keys("scheduler.params.", NUMBER, "warmup_min_ratio cos_min_ratio"),
    "scheduler.params.warmup_type": TEXT,
}
"""What has another owner: `auto`, or what the recipe says (`ds_agreement`)."""

_ZERO = "zero_optimization."
SECOND_NAMES = {
    f"{_ZERO}stage3_gather_fp16_weights_on_model_save": f"{_ZERO}stage3_gather_16bit_weights_on_model_save",
    **{
        f"{_ZERO}{key.removeprefix(f'{_ZERO}stage3_')}": key
        for key in (*PROVEN, f"{_ZERO}stage3_gather_16bit_weights_on_model_save")
        if key.startswith(f"{_ZERO}stage3_")
    },
}
"""DeepSpeed has two names for these; what they stand for."""

OFFLOADS = {f"{_ZERO}cpu_offload": f"{_ZERO}offload_optimizer", f"{_ZERO}cpu_offload_param": f"{_ZERO}offload_param"}
"""Old switches, each for a section with `"device": "cpu"`."""

CHOICES = (f"{_ZERO}stage", *(f"{section}.device" for section in OFFLOADS.values()))
"""Here `auto` says nothing: nobody else decides it."""

LEAVES = {*PROVEN, *INERT, *REFUSED, *RECIPES, *SECOND_NAMES, *OFFLOADS}
SECTIONS = {key[:at] for key in LEAVES for at, letter in enumerate(key) if letter == "."}
