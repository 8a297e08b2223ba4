"""One owner for every number: what a DeepSpeed JSON repeats of the recipe must be what the recipe says.

The JSON is the one that `ds_check.accepted` returns: `auto` is gone from it.
"""

import math
from collections.abc import Iterator
from typing import Any

from d2v_scale.errors import ConfigError
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel.ds_values import same

_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "polynomial", "WarmupCosineLR": "cosine"}
"""DeepSpeed's schedules after a warm-up, by the name that recipes have for them."""

Claims = Iterator[tuple[str, Any, str]]
"""Path of a key, the recipe's value (None: it has none), what says so."""


def agree(said: dict[str, Any], key: str, ours: Any, owner: str) -> None:
    """Raises ConfigError with both values when the JSON has another one at this path than the recipe."""
    theirs: Any = said
    for name in key.split("."):
        if not isinstance(theirs, dict) or name not in theirs:
            return
        theirs = theirs[name]
    if ours is not None and _equal(theirs, ours):
        return
    raise ConfigError(
        key,
        f"is {theirs!r} in the DeepSpeed JSON, but {owner} says {'in other units' if ours is None else repr(ours)}",
        'Write "auto" in the JSON, or change one of the two.',
    )


def check_optimizer(said: dict[str, Any], optim: OptimConfig) -> None:
    """Raises ConfigError for an `optimizer` or `scheduler` section that is not the recipe's `optim`."""
    kind = said.get("optimizer", {}).get("type", "AdamW")
    # DeepSpeed's Adam decouples weight decay unless told otherwise.
    if kind.lower() not in ("adamw", "adam"):
        agree(said, "optimizer.type", "AdamW", "the optimizer of d2v_scale (with optim.muon also Muon)")
    for key, ours, owner in _optimizer(optim):
        agree(said, f"optimizer.params.{key}", ours, owner)
    schedule = said.get("scheduler", {})
    kind, parameters = schedule.get("type"), schedule.get("params", {})
    # The type alone, with every number left to `auto`, is a template for any schedule.
    if kind is not None and (kind not in _SCHEDULES or (parameters and _SCHEDULES[kind] != optim.schedule)):
        agree(said, "scheduler.type", _deepspeed_name(optim), f"optim.schedule {optim.schedule}")
    for key, ours, owner in _scheduler(optim):
        agree(said, f"scheduler.params.{key}", ours, owner)


def template_note(said: dict[str, Any], optim: OptimConfig) -> str | None:
    """What to tell who reads the JSON for the schedule: its type is another, and has no number that would say so."""
    kind = said.get("scheduler", {}).get("type")
    if kind is None or _SCHEDULES.get(kind) == optim.schedule:
        return None
    return f"The DeepSpeed JSON leaves its {kind} to `auto`: optim.schedule is used, {optim.schedule}"


def _optimizer(optim: OptimConfig) -> Claims:
    yield "lr", optim.lr, "optim.lr"
    yield "betas", list(optim.betas), "optim.betas"
    yield "eps", optim.eps, "optim.eps"
    yield "weight_decay", optim.weight_decay, "optim.weight_decay"
    yield "max_grad_norm", optim.clip, "optim.clip"
    for key, ours in (("adam_w_mode", True), ("bias_correction", True), ("amsgrad", False)):
        yield key, ours, "the optimizer of d2v_scale, AdamW,"


def _scheduler(optim: OptimConfig) -> Claims:
    warmup = int(optim.phase_ratio[0] * optim.max_steps) if optim.schedule == "tri_stage" else optim.warmup_steps
    first = optim.phase_scale[0] if optim.schedule == "tri_stage" else 0.0
    yield "warmup_max_lr", optim.lr, "optim.lr"
    yield "warmup_min_lr", first * optim.lr, "the recipe's warm-up"
    yield "warmup_min_ratio", first, "the recipe's warm-up"
    yield "warmup_num_steps", warmup, "the recipe's warm-up"
    yield "warmup_type", "linear", "the recipe's warm-up"
    yield "total_num_steps", optim.max_steps, "optim.max_steps"
    yield "cos_min_ratio", optim.min_lr / optim.lr if optim.lr else 0.0, "optim.min_lr / optim.lr"


def _deepspeed_name(optim: OptimConfig) -> str:
    return {ours: theirs for theirs, ours in _SCHEDULES.items()}.get(optim.schedule, optim.schedule)


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_equal, theirs, ours))
    if isinstance(ours, float) and type(theirs) in (int, float):
        return math.isclose(theirs, ours, rel_tol=1e-9)
    return same(theirs, ours)
