"""Numbers that no recipe can mean: not finite, true or false, or on the wrong side of zero.

Every numeric key of a recipe is held to the same rule, those of sections to come included: a finite number, not below
0. `SIGNED` and `ABOVE_ZERO` name the keys that differ, `SHARES` those that are a part of something. What depends on
another key, and tighter bounds with their own words, are checked beside what the key configures.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

from d2v_scale.errors import ConfigError

SIGNED = {
    "seed": "any whole number names a stream of random numbers",
    "objective.masking.adjust": "may also make the selected share smaller",
    "evaluation.layers": "negative numbers count from the last block",
    "data.vision.mean": "of pixels that were shifted before",
    "model.arrays.*.mean": "of any values",
}
"""Keys that may be below 0, and why."""

ABOVE_ZERO = (
    "global_batch_size",
    "accumulation",
    "max_skipped_in_a_row",
    "hang_limit_minutes",
    "model.speech.conv_layers",
    "model.speech.pos_conv_kernel",
    "model.speech.pos_conv_groups",
    "model.vision.image_size",
    "model.vision.patch_size",
    "model.vision.channels",
    "model.text.vocab_size",
    "model.text.max_positions",
    "model.text.token_std",
    "model.arrays.*.channels",
    "model.arrays.*.axes.*.patch",
    "model.arrays.*.axes.*.extent",
    "model.arrays.*.axes.*.rate",
    "model.arrays.*.log_floor",
    "model.arrays.*.log_mel.sample_rate",
    "model.arrays.*.log_mel.hop_ms",
    "model.arrays.*.log_mel.window_ms",
    "model.arrays.*.log_mel.high_hz",
    "model.arrays.*.std",
    "model.backbone.width",
    "model.backbone.heads",
    "model.backbone.ffn",
    "model.backbone.depth",
    "model.backbone.norm_eps",
    "model.backbone.init_std",
    "model.predictor.width",
    "model.predictor.kernel",
    "model.predictor.groups",
    "objective.masking.length",
    "objective.masking.target_count",
    "objective.masking.min_block",
    "objective.masking.clones",
    "objective.target.weight",
    "objective.further_targets.*.weight",
    "objective.loss.scale",
    "objective.loss.weight",
    "objective.health.patience",
    "data.sources.*.weight",
    "data.sources.*.repeat",
    "data.sources.*.batch_size",
    "data.temperature",
    "data.window_shards",
    "data.prefetch",
    "data.timeout_s",
    "data.read_timeout_s",
    "data.cache_gib",
    "data.vision.crop_scale",
    "data.vision.crop_ratio",
    "data.vision.std",
    "data.vision.evaluation_crop",
    "data.vision.max_pixels",
    "data.speech.min_seconds",
    "data.speech.max_seconds",
    "optim.max_steps",
    "optim.spikes.factor",
    "optim.spikes.leave_out",
    "optim.spikes.most",
    "parallel.tensor",
    "parallel.pipeline",
    "checkpoint.keep_last",
    "checkpoint.peer_timeout",
    "tracking.log_every",
    "tracking.straggler_factor",
    "tracking.peak_tflops",
    "evaluation.batch_size",
    "evaluation.k",
    "evaluation.max_train",
    "evaluation.max_test",
    "evaluation.max_masked",
    "task.layer_decay",
    "task.ctc.time_mask_length",
    "task.ctc.beam",
)
"""Keys that may not be 0 either."""

SHARES = (
    "objective.masking.prob",
    "objective.ema.start",
    "objective.ema.end",
    "data.max_bad_ratio",
    "data.vision.flip",
    "data.vision.crop_scale",
    "data.vision.evaluation_crop",
    "model.predictor.input_dropout",
    "task.label_smoothing",
    "task.layer_decay",
    "task.ctc.time_mask",
    "task.ctc.channel_mask",
    "task.image.erase",
    "task.image.mix_probability",
)
"""Keys that may not be above 1."""


_NAMED = re.compile(r"\.(arrays|axes)\.[^.]+(?=\.)")
"""Sections by names of the user's own are all held to the same bounds."""
_OWN = re.compile(r"^(model|objective)\.\w+(?:\.\*)?\.(predictor|masking|target|further_targets|loss|health)\b")
"""What a stem does differently is held to the bounds of what it overrides."""
_OF_TEACHER = re.compile(r"^teacher\.(?=model\.)")
"""A teacher's own model is held to those of the student's."""


def numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Every key of a section that may hold numbers: its dotted name, its value, and whether true and false fit it."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, hint = getattr(section, field.name), str(hints[field.name])
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif isinstance(value, list) and any(map(dataclasses.is_dataclass, value)):
            for number, item in enumerate(value):
                yield from numbers(item, f"{prefix}{field.name}.{number}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            for name, item in value.items():
                yield from numbers(item, f"{prefix}{field.name}.{name}.")
        elif "int" in hint or "float" in hint or "bool" in hint:
            yield f"{prefix}{field.name}", value, "bool" in hint


def general(key: str) -> str:
    """The key with `*` for numbers in a list, and for names of the user's own."""
    return _NAMED.sub(r".\1.*", re.sub(r"\.\d+\.", ".*.", key))


def check(section: Any) -> None:
    """Raises ConfigError for the first key with an impossible number."""
    for key, value, is_switch in numbers(section):
        shown = f"is {list(value) if isinstance(value, tuple) else value}"
        rule = _OWN.sub(r"\1.\2", general(_OF_TEACHER.sub("", key)))
        for number in _flat(value):
            if isinstance(number, bool):
                if not is_switch:
                    raise ConfigError(key, shown, "Give a number.")
            elif isinstance(number, (int, float)):
                _check_one(key, rule, number, shown)


def _check_one(key: str, rule: str, number: float, shown: str) -> None:
    if not math.isfinite(number):
        raise ConfigError(key, shown, "Give a finite number.")
    if rule in SHARES and number > 1:
        raise ConfigError(key, shown, "Give at most 1.")
    if rule in ABOVE_ZERO and number <= 0:
        raise ConfigError(key, shown, "Give a number above 0.")
    if rule not in SIGNED and number < 0:
        raise ConfigError(key, shown, "Give a number that is not below 0.")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
