"""The DeepSpeed configuration: read, checked against the recipe and the topology, and completed.

One owner for every number. Batch size, accumulation, clipping, precision, optimizer and schedule are the recipe's;
the DeepSpeed JSON says `auto` or repeats them. Stage, offload and communication are the JSON's.
"""

import copy
import json
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from d2v_scale import templates
from d2v_scale.errors import ConfigError
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel.config import ParallelConfig, data_parallel_size
from d2v_scale.parallel.ds_agreement import agree, check_optimizer, template_note
from d2v_scale.parallel.ds_check import accepted, without_effect


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
    stems: int = 1
    """Of the model. Where there are several, the last micro-batch of a step may leave out what an earlier one used."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """For the sections `optimizer` and `scheduler`, which must agree with it. Clipping is `clip`."""


def read(path: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON as it stands, `ds_configs/NAME` from any folder. Raises ConfigError when it cannot be read."""
    try:
        text = templates.deepspeed_config(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError("deepspeed_config", f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError("deepspeed_config", f"{path} is not UTF-8: {error}", "Save it as UTF-8.") from error
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError("deepspeed_config", f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("deepspeed_config", f"{path} must hold a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON. Raises ConfigError when it has a key twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError("deepspeed_config", f"the DeepSpeed JSON has the key {twice!r} twice", "Leave one of them.")
    return found


def resolve(raw: dict[str, Any], numbers: RecipeNumbers, parallel: ParallelConfig, world_size: int) -> dict[str, Any]:
    """The configuration DeepSpeed gets. Raises ConfigError for what contradicts the recipe or cannot work.

    Pure: forms no process group and allocates nothing.
    """
    replicas = data_parallel_size(parallel, world_size)
    said = accepted(raw)
    check_legal(said, parallel, numbers)
    micro_batch_size = None
    if numbers.global_batch_size is not None:
        micro_batch_size = -(-numbers.global_batch_size // (replicas * numbers.accumulation))
    _check_agreement(said, parallel, numbers, micro_batch_size)
    config = copy.deepcopy(said)
    for key in ("train_batch_size", "fp16", "optimizer", "scheduler"):
        config.pop(key, None)
    # Micro-batches may differ in size; the loss is divided by what was masked in the whole step, not by this number.
    config["train_micro_batch_size_per_gpu"] = micro_batch_size or 1
    config["gradient_accumulation_steps"] = numbers.accumulation
    config["gradient_clipping"] = float(numbers.clip)
    config["bf16"] = {**said.get("bf16", {}), "enabled": numbers.precision == "bf16"}
    if numbers.precision == "bf16":
        config["bf16"]["check_grad_overflow"] = True
        if not _bf16_stage1(said):
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    zero = config["zero_optimization"]
    if zero["stage"] == 1 and replicas == 1 and parallel.pipeline == 1 and "offload_optimizer" not in zero:
        # Where nothing is reduced, the buffer for it only costs a copy of every gradient.
        zero.setdefault("contiguous_gradients", False)
    if zero["stage"] == 3 and "param_persistence_threshold" not in zero:
        # DeepSpeed would gather every small parameter after each step in a collective of its own.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    if zero["stage"] < 3 and replicas > 1 and not zero.setdefault("reduce_scatter", False):
        # With it DeepSpeed sends the same, but loops over ranks and copies the bucket. It divides before the sum.
        config["prescale_gradients"] = True
    if _leaves_out(zero, numbers.stems, numbers.accumulation):
        zero["overlap_comm"] = False
    if parallel.pipeline > 1:
        config["pipeline"] = {**said.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False}
        config["pipeline"].pop("stages", None)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 1_000_000_000)
    # DeepSpeed's clock of samples per second waits for the device before and after every micro-batch.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return config


def _leaves_out(zero: dict[str, Any], stems: int, accumulation: int) -> bool:
    """Whether gradients would be reduced wrongly: with `overlap_comm` stage 1 reduces those alone that the last
    micro-batch has made anew, so what only an earlier one used would stay a rank's own."""
    return bool(zero.get("overlap_comm")) and zero.get("stage") == 1 and stems > 1 and accumulation > 1


def remarks(raw: dict[str, Any], optim: OptimConfig, stems: int = 1, accumulation: int = 1) -> list[str]:
    """What to tell whoever wrote a DeepSpeed JSON that `resolve` accepts: what of it is not done as it says. `stems`,
    `accumulation`: as in `RecipeNumbers`."""
    said = accepted(raw)
    overlap = None
    if _leaves_out(said.get("zero_optimization") or {}, stems, accumulation):
        overlap = (
            "zero_optimization.overlap_comm is taken as false: at stage 1 it would not reduce the gradients of a stem "
            "that the last micro-batch of a step does not read"
        )
    return [line for line in (template_note(said, optim), without_effect(said), overlap) if line is not None]


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
        import torch

        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
        "steps_per_print": config["steps_per_print"],
    }


def check_legal(said: dict[str, Any], parallel: ParallelConfig, numbers: RecipeNumbers) -> None:
    """Raises ConfigError, with the reason, for combinations that do not work. `said`: of `ds_check.accepted`."""
    zero = said.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    if stage == 0:
        raise ConfigError(
            "zero_optimization.stage",
            "is 0; stage 0 gives no verdict on non-finite steps and no fp32 weights in bf16",
            "Use the number 1, 2 or 3 (stage 1 also for a single process).",
        )
    if parallel.pipeline > 1 and stage > 1:
        raise ConfigError(
            "zero_optimization.stage",
            f"is {stage} with parallel.pipeline={parallel.pipeline}; DeepSpeed's pipeline works with ZeRO-1 only",
            "Use stage 1 with the pipeline, or parallel.pipeline=1 with stage 2 or 3.",
        )
    if zero.get("offload_param", {}).get("device", "none") != "none" and stage != 3:
        raise ConfigError("zero_optimization.offload_param", f"needs stage 3, and the stage is {stage}")
    accumulate = said.get("data_types", {}).get("grad_accum_dtype", "bf16")
    if numbers.precision == "bf16" and _bf16_stage1(said) and accumulate != "bf16":
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
            f"must be false to compile at stage 3 on torch {version('torch')}: gradients come out as zero without a "
            "warning",
            "Set it to false, do not compile, or use torch 2.13.",
        )


def _check_agreement(
    said: dict[str, Any], parallel: ParallelConfig, numbers: RecipeNumbers, micro_batch_size: int | None
) -> None:
    """Raises ConfigError where the JSON repeats a number of the recipe and has another."""
    agree(said, "train_batch_size", numbers.global_batch_size, "the recipe's global batch size (in samples)")
    agree(said, "train_micro_batch_size_per_gpu", micro_batch_size, "global batch size / ranks / accumulation")
    agree(said, "gradient_accumulation_steps", numbers.accumulation, "the recipe's accumulation")
    agree(said, "gradient_clipping", numbers.clip, "optim.clip")
    agree(said, "bf16.enabled", numbers.precision == "bf16", f"precision {numbers.precision}")
    if said.get("fp16", {}).get("enabled"):
        raise ConfigError("fp16.enabled", "fp16 is not supported", "Use bf16 (precision: bf16) or fp32.")
    agree(said, "pipeline.stages", parallel.pipeline, "parallel.pipeline")
    check_optimizer(said, numbers.optim)
    # Gradients are added up in fp32, or in the recipe's precision where DeepSpeed does so by itself.
    for section, key in ((said, "communication_data_type"), (said.get("data_types", {}), "grad_accum_dtype")):
        if section.get(key, "fp32") not in ("fp32", numbers.precision):
            path = key if section is said else f"data_types.{key}"
            raise ConfigError(
                path, f"is {section[key]!r} with precision {numbers.precision}", "Give fp32, or leave it out."
            )


def _bf16_stage1(said: dict[str, Any]) -> bool:
    """Stage 1 without offload: in bf16, gradients of several micro-batches are added in bf16."""
    zero = said["zero_optimization"]
    return zero["stage"] == 1 and zero.get("offload_optimizer", {}).get("device", "none") == "none"


def _torch_version() -> tuple[int, int]:
    major, minor = version("torch").split(".")[:2]
    return int(major), int(minor)
