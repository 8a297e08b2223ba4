"""Which recorded figures are drawn together, and in which part of a report: what health.png and the report share."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from d2v_scale.finetuning.metric_names import METRICS
from d2v_scale.tracking.figure_names import FIGURES, figure_name
from d2v_scale.tracking.names import by_stem

LAYER = "/layer_"
"""In the name of a value that there is one of for every layer."""
_BY_HIDDEN = "loss/masked_"
Part = Literal["Loss", "Quality", "Health", "Speed"]
PARTS: tuple[Part, ...] = ("Loss", "Quality", "Health", "Speed")
"""Of a report, in their order."""


class Group(NamedTuple):
    """Values that are drawn on one pair of axes."""

    part: Part
    title: str
    names: tuple[str, ...]
    """Names, or beginnings of names that end in `*`, or ends that begin so."""
    log: bool = False
    why: str = ""
    """What a reader should know of it, in a sentence."""
    least: int = 1
    """Names without which there is nothing to compare."""


_SCORES = tuple(f"test/{metric}" for kind in ("classify", "regress") for metric in METRICS[kind])
_ERRORS = tuple(f"test/{metric}" for metric in METRICS["ctc"])
GROUPS = (
    Group("Loss", "Loss", ("loss", "held_out_loss", "held_out_loss/*", "loss/*")),
    Group("Loss", "Loss by how much of a row is hidden", ("loss/masked_*",), least=2),
    Group(
        "Quality",
        "Accuracy of k nearest neighbours and probes",
        ("knn_accuracy*", "knn_raw*", "knn_chance*", "probe*"),
        why="The first value is that of random weights; raw features are the samples themselves, without a model.",
    ),
    Group("Quality", "Fine-tuned, on held-out samples: higher is better", _SCORES),
    Group("Quality", "Fine-tuned, on held-out samples: lower is better", _ERRORS),
    Group(
        "Quality",
        "Share of held-out targets that is explained",
        ("held_out_explained*",),
        why="0: no better than their mean.",
    ),
    Group(
        "Quality",
        "Rank of held-out features, without labels (RankMe, LiDAR)",
        ("rankme*", "lidar*"),
        why="Directions that are used, and those that tell samples apart rather than views of one sample.",
    ),
    Group(
        "Health",
        "Spread over samples (mean standard deviation)",
        ("target_std*", "prediction_std*", "stem_std*"),
        why="Near 0: all samples look alike to the network, it has collapsed.",
    ),
    Group(
        "Health",
        "Effective rank",
        ("target_rank*", "prediction_rank*"),
        why="How many directions are used; 1 is a collapse.",
    ),
    Group(
        "Health",
        "Mean cosine between samples",
        ("target_cosine*", "prediction_cosine*"),
        why="Near 1: all samples look alike.",
    ),
    Group("Health", "Teacher", ("student_teacher_*", "teacher_update_norm", "teacher_norm"), log=True),
    Group("Health", "Gradient norm", ("grad_norm", "grad_norm/*"), log=True),
    Group("Health", "Update, as a share of the weights", ("update_ratio/*",), log=True),
    Group(
        "Health",
        "Attention entropy, share of the widest",
        ("attention_entropy*",),
        why="100 %: attention to everything alike.",
    ),
    Group(
        "Health",
        "Likeness of student and teacher (CKA)",
        ("cka*",),
        why="Layer by layer: of the student, which sees the masked sample, and the teacher, which sees all of it.",
    ),
    Group(
        "Health",
        "Likeness of the teacher's first and last layer (CKA)",
        ("layer_likeness*",),
        why="1: the layers between them change nothing, as in a network that has just begun.",
    ),
    Group("Health", "Share of positions that masks hide", ("masked_share*",)),
    Group("Health", "Learning rate", ("lr", "lr/*")),
    Group("Health", "EMA decay", ("decay",)),
    Group("Health", "Skipped and lost", ("skipped*", "data/lost", "memory_copies_lost")),
    Group("Speed", "Per second", ("*s_per_second",), log=True),
    Group("Speed", "Model FLOPs utilisation", ("mfu*",)),
    Group("Speed", "Seconds", ("step_seconds", "ema_*seconds", "*_stall_seconds"), log=True),
    Group("Speed", "Share of time", ("*_wait_share", "host_cpu_share", "pipeline_idle/*")),
    Group("Speed", "Share of a batch that is padding", ("data/padding",)),
    Group("Speed", "Share of the host's memory", ("host_memory_used_share",)),
    Group("Speed", "Memory, GiB", ("host_memory_gib", "device_memory_gib", "device_memory_peak_gib")),
)


def names_of(records: Sequence[dict[str, Any]], group: Group) -> list[str]:
    """The recorded names that belong to a group: in the group's order, then in order of first appearance."""
    seen = {name: None for record in records for name in record}
    return list(dict.fromkeys(name for wanted in group.names for name in seen if _belongs(name, wanted, group)))


def _belongs(name: str, wanted: str, group: Group) -> bool:
    if name.startswith(_BY_HIDDEN) and group.least == 1:
        return False  # of rows that all hide as much it is the loss again
    before, star, after = wanted.partition("*")
    if not star:
        return name == wanted
    return name.startswith(before) and name.endswith(after) and len(name) >= len(before) + len(after)


def sources_of(names: Sequence[str]) -> list[str]:
    """The stems and sources of a run that tells several apart."""
    found = [source for figure in ("target_std", "loss", "knn_accuracy") for source in by_stem(names, figure)]
    return [source for source in dict.fromkeys(found) if source]


def without_source(name: str, source: str) -> str | None:
    """A figure's name without this source's in it: `cka/vision/layer_1` is `cka/layer_1`; None: it is not of it."""
    family, _, rest = name.partition("/")
    if rest == source:
        return family
    return f"{family}/{rest.removeprefix(f'{source}/')}" if rest.startswith(f"{source}/") else None


def line_labels(names: Sequence[str]) -> dict[str, str]:
    """What the lines of one pair of axes are called: without what all of them share."""
    families = {name.partition("/")[0] for name in names if "/" in name and name not in FIGURES}
    labels = {}
    for name in names:
        family, _, rest = name.partition("/")
        words = figure_name(name).words
        own = rest and name not in FIGURES and len(families) > 1
        labels[name] = f"{figure_name(family).words}, {words}" if own else words
    return labels
