"""What recorded figures are called where a person reads them, and in which unit. Nothing heavy is imported."""

import math
from typing import Literal, NamedTuple

Unit = Literal["", "share", "count", "s", "h", "GiB", "samples/s", "tokens/s", "s of audio/s", "patches/s"]


class FigureName(NamedTuple):
    """Of one figure."""

    words: str
    unit: Unit = ""
    """`share`: of one, shown in percent; `count`: a whole number; empty: a plain number."""


FIGURES = {
    "step": FigureName("step", "count"),
    "samples": FigureName("samples seen", "count"),
    "hours": FigureName("wall clock", "h"),
    "loss": FigureName("loss"),
    "held_out_loss": FigureName("held-out loss"),
    "held_out_explained": FigureName("held-out targets explained", "share"),
    "knn_accuracy": FigureName("k-NN accuracy", "share"),
    "knn_chance": FigureName("chance (commonest label)", "share"),
    "knn_raw": FigureName("raw features", "share"),
    "rankme": FigureName("RankMe, of the teacher"),
    "lidar": FigureName("LiDAR, of the student"),
    "probe": FigureName("probe", "share"),
    "test/accuracy": FigureName("accuracy", "share"),
    "test/f1": FigureName("F1", "share"),
    "test/matthews": FigureName("Matthews correlation"),
    "test/pearson": FigureName("Pearson correlation"),
    "test/spearman": FigureName("Spearman correlation"),
    "test/wer": FigureName("word error rate", "share"),
    "test/cer": FigureName("character error rate", "share"),
    "target_std": FigureName("targets"),
    "prediction_std": FigureName("predictions"),
    "stem_std": FigureName("stem's output"),
    "target_rank": FigureName("targets"),
    "prediction_rank": FigureName("predictions"),
    "target_cosine": FigureName("targets"),
    "prediction_cosine": FigureName("predictions"),
    "student_teacher_distance": FigureName("distance from the student"),
    "student_teacher_distance_relative": FigureName("distance from the student, in its own norm"),
    "teacher_update_norm": FigureName("length of an update"),
    "teacher_norm": FigureName("norm of its weights"),
    "grad_norm": FigureName("all"),
    "update_ratio": FigureName("all"),
    "attention_entropy": FigureName("mean of the layers", "share"),
    "cka": FigureName("mean of the layers"),
    "layer_likeness": FigureName("first and last layer"),
    "masked_share": FigureName("hidden positions", "share"),
    "lr": FigureName("learning rate"),
    "decay": FigureName("EMA decay"),
    "samples_per_second": FigureName("samples", "samples/s"),
    "tokens_per_second": FigureName("tokens", "tokens/s"),
    "audio_seconds_per_second": FigureName("seconds of audio", "s of audio/s"),
    "patches_per_second": FigureName("patches", "patches/s"),
    "mfu": FigureName("student and teacher", "share"),
    "mfu_student": FigureName("student alone", "share"),
    "data_wait_share": FigureName("waiting for data", "share"),
    "host_cpu_share": FigureName("processors in use", "share"),
    "host_memory_used_share": FigureName("host memory in use", "share"),
    "data/padding": FigureName("padding in batches", "share"),
    "pipeline_idle": FigureName("idle pipeline stage", "share"),
    "host_memory_gib": FigureName("this process", "GiB"),
    "device_memory_gib": FigureName("device", "GiB"),
    "device_memory_peak_gib": FigureName("device, at its peak", "GiB"),
    "ema_seconds": FigureName("EMA update", "s"),
    "ema_wait_seconds": FigureName("waiting for the EMA update", "s"),
    "checkpoint_stall_seconds": FigureName("held up by a checkpoint", "s"),
    "memory_copy_stall_seconds": FigureName("held up by a copy in memory", "s"),
    "memory_copies_lost": FigureName("copies in memory that were lost", "count"),
    "step_seconds": FigureName("a step", "s"),
    "spent": FigureName("wall clock went into", "s"),
    "skipped_updates": FigureName("skipped updates", "count"),
    "data/lost": FigureName("lost samples", "count"),
}
"""By recorded name, or by what stands before a `/` for all that begin so."""
_PARTS = {
    "stem": "stem",
    "blocks_first": "first third of the blocks",
    "blocks_middle": "middle third of the blocks",
    "blocks_last": "last third of the blocks",
    "predictor": "predictor",
}


def figure_name(name: str) -> FigureName:
    """Of a recorded figure; one that is not known is called by its record's name, in words."""
    if name in FIGURES:
        return FIGURES[name]
    family, _, rest = name.partition("/")
    if rest and family in FIGURES:
        return FIGURES[family]._replace(words=_rest_in_words(rest))
    unit: Unit = "share" if name.endswith("_share") else "s" if name.endswith("_seconds") else ""
    return FigureName(name.replace("_", " "), unit)


def _rest_in_words(rest: str) -> str:
    """Of what stands behind the first `/`: a part of the network, a layer, rows by how much is hidden, a source."""
    if rest.startswith("layer_"):
        return f"layer {int(rest.removeprefix('layer_'))}"
    if rest.startswith("masked_"):
        low, _, high = rest.removeprefix("masked_").partition("_")
        return f"{low} to {high} % hidden"
    if rest.startswith("target_"):
        return f"target {rest.removeprefix('target_')}"
    return _PARTS.get(rest, rest.replace("/", ", ").replace("_", " "))


def shown(name: str, value: float | None) -> str:
    """A value with its unit, as a person reads it; a dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    unit = figure_name(name).unit
    if unit == "share":
        return f"{value:.1%}".replace("%", " %")
    if unit == "h":
        return _duration(value)
    if unit == "count":
        return f"{value:,.0f}"
    return f"{value:,.4g} {unit}".rstrip() if abs(value) < 1e4 else f"{value:,.0f} {unit}".rstrip()


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:,.1f} h"
