"""README.md of an exported folder: what the model is, what it saw, how it did, how to load it."""

import math
from pathlib import Path, PurePosixPath
from typing import Any

from d2v_scale.checkpoint import Checkpoint
from d2v_scale.interop.huggingface import is_native, row_of
from d2v_scale.interop.task_heads import auto_class, head_of
from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import Recipe
from d2v_scale.tracking.record import AXES, METRICS_FILE, read_records

CARD_FILE = "README.md"
UNKNOWN_LICENSE = "unknown"
# A card that people have rewritten lacks it, and is theirs.
_MARK = "<!-- Written by tools/export.py. Without this line, a later export leaves the file alone. -->"


def write_card(
    checkpoint: Checkpoint, recipe: Recipe, modality: str | None, out: Path, weights: str, license_id: str
) -> list[str]:
    """Write README.md beside what was exported; `modality` None: a folder under our own names. Returns lines for the
    user. A README.md that people wrote stays."""
    path = out / CARD_FILE
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return [f"{path} is not ours, and stays as it is"]
    path.write_text(_card(checkpoint, recipe, modality, out, weights, license_id), encoding="utf-8")
    return []


def _card(
    checkpoint: Checkpoint, recipe: Recipe, modality: str | None, out: Path, weights: str, license_id: str
) -> str:
    version = "2.0" if recipe.model.visible_only else "1.0"
    modalities = ", ".join(recipe.model.modalities if modality is None else [modality])
    what = "encoder" if recipe.task is None else "fine-tuned model"
    head = ["library_name: transformers"] if modality is not None else []
    if modality is not None:
        head.append(f"pipeline_tag: {_pipeline(recipe, modality)}")
    tags = [f"- {tag}" for tag in ("data2vec", *modalities.split(", "))]
    rows = [("recipe", recipe.name), ("steps", f"{checkpoint.step}"), ("weights", f"the {weights}'s")]
    rows += [("parameters", _sizes(recipe.model)), ("data", _data(recipe)), ("license", license_id)]
    loading = _own_lines() if modality is None else _lines(recipe, modality, out)
    return "\n".join(
        [
            *["---", f"license: {license_id}", *head, "tags:", *tags, "---", _MARK],
            *["", f"# {recipe.name}", "", f"A data2vec {version} {what} of {modalities}, trained with d2v_scale."],
            *["", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)],
            *["", "## Scores", "", *_scores(checkpoint)],
            *["", "## Loading", "", "In this folder:", "", "```python", *loading, "```", ""],
        ]
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _sizes(model: ModelConfig) -> str:
    backbone = model.backbone
    return f"{backbone.prenet_depth + backbone.depth} blocks of width {backbone.width}, {backbone.heads} heads"


def _data(recipe: Recipe) -> str:
    """Names alone: paths and commands may hold what is nobody's business."""
    sources = [source for source in recipe.data.sources if source.shards]
    found = []
    for source in sources:
        name = source.name or ("" if ":" in source.shards else PurePosixPath(source.shards).name)
        found.append(f"{source.modality} ({name})" if name else source.modality)
    return ", ".join(found) or "not recorded"


def _scores(checkpoint: Checkpoint) -> list[str]:
    """The last value of every score up to the checkpoint's step, from the run's own record."""
    run_dir = checkpoint.path.resolve().parent.parent
    values: dict[str, tuple[float, int]] = {}
    for record in read_records(run_dir) if (run_dir / METRICS_FILE).is_file() else []:
        if record["step"] <= checkpoint.step:
            values |= {name: (value, record["step"]) for name, value in record.items() if _is_score(name, value)}
    if not values:
        return ["None were recorded."]
    rows = [f"| {name} | {value:.4g} | {step} |" for name, (value, step) in sorted(values.items())]
    return ["| score | value | at step |", "|---|---|---|", *rows]


def _is_score(name: str, value: Any) -> bool:
    known = name in ("loss", "knn_accuracy") or name.startswith("test/")
    return known and name not in AXES and isinstance(value, (int, float)) and math.isfinite(value)


def _pipeline(recipe: Recipe, modality: str) -> str:
    if recipe.task is None:
        return row_of(recipe.model, modality).encoder_task
    return head_of(recipe.task, recipe.model, modality).pipeline


def _own_lines() -> list[str]:
    return [
        "from d2v_scale.interop.encoder_source import open_encoder",
        "",
        'source = open_encoder(".")',
        "print(source.recipe.name, source.step)",
    ]


def _lines(recipe: Recipe, modality: str, out: Path) -> list[str]:
    """A program that loads the folder and runs it on a stand-in for the user's input."""
    model = recipe.model
    auto = auto_class(recipe.task, model, modality)
    remote = "" if is_native(model, modality) else ", trust_remote_code=True"
    result = "last_hidden_state" if auto == "AutoModel" else "logits"
    example = row_of(model, modality).example(model.of(modality), out)
    imports = f"from transformers import {', '.join(sorted({auto, *example.processors}))}"
    lines = ["import numpy as np"] if "np." in example.given else []
    lines += ["import torch", *(["from PIL import Image"] if "Image." in example.given else []), imports, ""]
    lines.append(f'model = {auto}.from_pretrained("."{remote}).eval()')
    own = ", trust_remote_code=True" if example.remote_processor else ""
    lines += [f'processor = {name}.from_pretrained("."{own})' for name in example.processors]
    run = f"    output = model({example.call}).{result}"
    return [*lines, example.given, "with torch.no_grad():", run, "print(output.shape)"]
