"""The DeepSpeed configuration: read, checked against the recipe and the topology, and completed.

One owner for every number. Batch size, accumulation, clipping, precision, optimizer and schedule are the recipe's;
the DeepSpeed JSON says `auto` or repeats them. Stage, offload and communication are the JSON's.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.ds_keys import check_keys
from d2v_scale.parallel.groups import ParallelConfig, data_parallel_size


@dataclass(frozen=True, kw_only=True)
class RecipeNumbers:
    """What the recipe decides and DeepSpeed must be told."""

    precision: Literal["fp32", "bf16"]
    accumulation: int = 1
    clip: float = 0.0
    global_batch_size: int | None = None
    """Samples of one optimizer step over all ranks; None where the recipe counts seconds or tokens."""
    compile: bool = False
    """The student's blocks are compiled."""


def read(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON as it stands. Raises ConfigError when it cannot be read."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError("deepspeed_config", f"cannot read {path}: {error.strerror}") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError("deepspeed_config", f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("deepspeed_config", f"{path} must hold a JSON object")
    return value


def resolve(raw: dict[str, Any], numbers: RecipeNumbers, parallel: ParallelConfig, world_size: int) -> dict[str, Any]:
    """The configuration DeepSpeed gets. Raises ConfigError for what contradicts the recipe or cannot work.

    Pure: forms no process group and allocates nothing.
    """
    replicas = data_parallel_size(parallel, world_size)
    check_keys(raw)
    check_legal(raw, parallel, numbers)
    _refuse_second_owner(raw)
    _check_dtypes(raw, numbers)
    config = copy.deepcopy(raw)
    for key in ("train_batch_size", "fp16", *(key for key, _ in _SECOND_OWNERS)):
        config.pop(key, None)
    micro_batch_size = None
    if numbers.global_batch_size is not None:
        micro_batch_size = -(-numbers.global_batch_size // (replicas * numbers.accumulation))
    _agree(raw, "train_batch_size", numbers.global_batch_size, "the recipe's global batch size (in samples)")
    _agree(raw, "train_micro_batch_size_per_gpu", micro_batch_size, "global batch size / ranks / accumulation")
    _agree(raw, "gradient_accumulation_steps", numbers.accumulation, "the recipe's accumulation")
    _agree(raw, "gradient_clipping", numbers.clip, "optim.clip")
    bf16 = dict(raw.get("bf16", {}))
    _agree(bf16, "enabled", numbers.precision == "bf16", f"precision {numbers.precision}", path="bf16.")
    # Micro-batches may differ in size; the loss is divided by what was masked in the whole step, not by this number.
    config["train_micro_batch_size_per_gpu"] = micro_batch_size or 1
    config["gradient_accumulation_steps"] = numbers.accumulation
    config["gradient_clipping"] = float(numbers.clip)
    config["bf16"] = {**bf16, "enabled": numbers.precision == "bf16"}
    if numbers.precision == "bf16":
        config["bf16"]["check_grad_overflow"] = True
        if not _bf16_stage1(raw):
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    zero = config["zero_optimization"]
    if zero["stage"] == 1 and replicas == 1 and parallel.pipeline == 1 and "offload_optimizer" not in zero:
        # Where nothing is reduced, the buffer for it only costs a copy of every gradient.
        zero.setdefault("contiguous_gradients", False)
    if zero["stage"] < 3 and replicas > 1 and not zero.setdefault("reduce_scatter", False):
        # With it DeepSpeed sends the same, but loops over ranks and copies the bucket. It divides before the sum.
        config["prescale_gradients"] = True
    if parallel.pipeline > 1:
        config["pipeline"] = {**raw.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False}
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 1_000_000_000)
    # DeepSpeed's clock of samples per second waits for the device before and after every micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return config


def teacher_config(config: dict[str, Any], precision: Literal["fp32", "bf16"], offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for the teacher's engine: ZeRO-3 without an optimizer, whatever the student's stage.

    The persistence threshold is 0: a parameter that stays gathered would serve stale values after an update.
    `memory_efficient_linear` saves memory in the backward pass, which a teacher has none of, and would replace
    `torch.nn.functional.linear` in the whole process, the student's too: torch 2.11 compiles it to zero gradients.
    `overlap_comm` gathers on a stream of its own, which the teacher makes wait for its updates. Without it DeepSpeed's
    bookkeeping of gathers, two of which may be under way, waits for the student's work on the default stream, too.
    """
    stage3 = {k: v for k, v in config["zero_optimization"].items() if k.startswith("stage3_")}
    zero: dict[str, Any] = {**stage3, "stage": 3, "stage3_param_persistence_threshold": 0}
    zero["memory_efficient_linear"] = False
    zero["overlap_comm"] = True
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
        "steps_per_print": config["steps_per_print"],
    }


def check_legal(raw: dict[str, Any], parallel: ParallelConfig, numbers: RecipeNumbers) -> None:
    """Raises ConfigError, with the reason, for combinations that do not work."""
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        why = "; stage 0 gives no verdict on non-finite steps and no fp32 weights in bf16" if stage == 0 else ""
        raise ConfigError(
            "zero_optimization.stage",
            f"is {stage!r}{why}",
            "Use the number 1, 2 or 3 (stage 1 also for a single process).",
        )
    if parallel.pipeline > 1 and stage > 1:
        raise ConfigError(
            "zero_optimization.stage",
            f"is {stage} with parallel.pipeline={parallel.pipeline}; DeepSpeed's pipeline works with ZeRO-1 only",
            "Use stage 1 with the pipeline, or parallel.pipeline=1 with stage 2 or 3.",
        )
    for key in ("pipe_partitioned", "grad_partitioned"):
        if raw.get("pipeline", {}).get(key):
            raise ConfigError(
                f"pipeline.{key}",
                "is true; more than one tensor with a gradient travels between the stages",
                "Set false or remove it.",
            )
    for key, neutral, reason in _REFUSED_ZERO_KEYS:
        if zero.get(key, neutral) != neutral:
            raise ConfigError(
                f"zero_optimization.{key}", f"is {zero[key]!r}; {reason}", f"Set {neutral!r} or remove it."
            )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"zero_optimization.{key}.device",
                f"is {device!r}; the EMA teacher and the checkpoints read the values from memory",
                "Use 'cpu' or 'none'.",
            )
    if (zero.get("offload_param") or {}).get("device", "none") != "none" and stage != 3:
        raise ConfigError("zero_optimization.offload_param", f"needs stage 3, and the stage is {stage}")
    accumulate = (raw.get("data_types") or {}).get("grad_accum_dtype", "auto")
    if numbers.precision == "bf16" and _bf16_stage1(raw) and accumulate not in ("auto", "bf16", None):
        raise ConfigError(
            "data_types.grad_accum_dtype",
            f"is {accumulate!r} with stage 1 in bf16; DeepSpeed then holds all gradients in fp32 on every rank",
            "Use stage 2, which accumulates its share in fp32, or leave the key out.",
        )
    if numbers.compile and parallel.tensor * parallel.pipeline > 1:
        raise ConfigError(
            "model.compile",
            f"is true with parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline}; blocks are "
            "compiled under ZeRO alone",
            "Set it to false, or divide the model by ZeRO-3.",
        )
    if (
        numbers.compile
        and stage == 3
        and _torch_version() < (2, 13)
        and zero.get("memory_efficient_linear", True) is not False
    ):
        raise ConfigError(
            "zero_optimization.memory_efficient_linear",
            f"must be false to compile at stage 3 on torch {torch.__version__}: gradients come out as zero without a "
            "warning",
            "Set it to false, do not compile, or use torch 2.13.",
        )


_REFUSED_ZERO_KEYS: list[tuple[str, Any, str]] = [
    ("zero_hpz_partition_size", 1, "the secondary copies of the weights would make the teacher stale"),
    ("zero_quantized_weights", False, "the teacher could not follow the student exactly"),
    ("zero_quantized_gradients", False, "the gradient would not be the one of the loss"),
    ("zero_quantized_nontrainable_weights", False, "the teacher would be quantized"),
    ("compute_grad_norm", True, "the gradient norm is the verdict on every step"),
    ("zenflow", None, "it delays updates past the step the verdict is about"),
    ("super_offload", False, "its optimizer keeps the fp32 weights where the teacher cannot read them"),
]

_SECOND_OWNERS: list[tuple[str, str]] = [
    ("optimizer", "the recipe's `optim` section makes the optimizer"),
    ("scheduler", "the recipe's `optim` section makes the learning-rate schedule"),
    ("amp", "precision is the recipe's"),
    ("torch_autocast", "precision is the recipe's"),
    ("elasticity", "the global batch size is the recipe's at any world size"),
    ("curriculum_learning", "the data plan is the recipe's"),
    ("data_efficiency", "the data plan is the recipe's"),
    ("prescale_gradients", "the loss is divided by what was masked in the whole step"),
    ("gradient_predivide_factor", "the loss is divided by what was masked in the whole step"),
    ("gradient_allreduce_op", "the loss is divided by what was masked in the whole step"),
    ("compression_training", "the teacher follows the whole weights"),
    ("quantize_training", "the teacher follows the whole weights"),
    ("weight_quantization", "the teacher follows the whole weights"),
    ("sparse_gradients", "gradients are dense"),
    ("sparse_attention", "attention is the model's"),
    ("progressive_layer_drop", "the recipe's model.backbone.layer_drop skips blocks"),
    ("hybrid_engine", "the model generates nothing"),
    ("expert_parallel", "the model has no experts"),
]

_DEFAULTS: dict[str, Any] = {
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "sparse_gradients": False,
}
"""Of keys in `_SECOND_OWNERS`: what DeepSpeed does without them, which may be written out."""


def _refuse_second_owner(raw: dict[str, Any]) -> None:
    for key, owner in _SECOND_OWNERS:
        off = isinstance(raw.get(key), dict) and raw[key].get("enabled") is False
        if not off and raw.get(key) not in (None, "auto", _DEFAULTS.get(key)):
            raise ConfigError(key, f"is set in the DeepSpeed JSON, but {owner}", "Remove it from the JSON.")
    if raw.get("fp16", {}).get("enabled") not in (None, False):
        raise ConfigError("fp16.enabled", "fp16 is not supported", "Use bf16 (precision: bf16) or fp32.")
    if (raw.get("tensor_parallel") or {}).get("autotp_size", 1) not in (0, 1):
        raise ConfigError("tensor_parallel.autotp_size", "blocks are tensor parallel already", "Use parallel.tensor.")
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if raw.get("bf16", {}).get(key):
            raise ConfigError(f"bf16.{key}", "master weights and moments must be fp32", "Remove it.")


def _check_dtypes(raw: dict[str, Any], numbers: RecipeNumbers) -> None:
    """Gradients are added up in fp32, or in the recipe's precision where DeepSpeed does so by itself."""
    types = raw.get("data_types", {})
    given = {
        "communication_data_type": raw.get("communication_data_type"),
        "data_types.grad_accum_dtype": types.get("grad_accum_dtype"),
    }
    for key, dtype in given.items():
        if dtype not in (None, "auto", "fp32", numbers.precision):
            raise ConfigError(key, f"is {dtype!r} with precision {numbers.precision}", "Give fp32, or leave it out.")
    for key in ("param_dtype", "buffer_dtype"):
        if types.get(key) not in (None, "auto"):
            raise ConfigError(f"data_types.{key}", f"is {types[key]!r}", "Leave it out: precision is the recipe's.")


def _bf16_stage1(raw: dict[str, Any]) -> bool:
    """Stage 1 without offload: in bf16, gradients of several micro-batches are added in bf16."""
    zero = raw["zero_optimization"]
    return zero["stage"] == 1 and (zero.get("offload_optimizer") or {}).get("device", "none") == "none"


def _agree(section: dict[str, Any], key: str, ours: Any, owner: str, path: str = "") -> None:
    theirs = section.get(key, "auto")
    if theirs == "auto" or (ours is not None and theirs == ours):
        return
    said = "in other units" if ours is None else repr(ours)
    raise ConfigError(
        f"{path}{key}",
        f"is {theirs!r} in the DeepSpeed JSON, but {owner} says {said}",
        'Write "auto" in the JSON, or change one of the two.',
    )


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
