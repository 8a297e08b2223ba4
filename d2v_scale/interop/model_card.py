"""README.md of an exported folder: what the model is, what it saw, how it did, how to load it."""

import math
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from d2v_scale.checkpoint import Checkpoint
from d2v_scale.interop.huggingface import is_native, model_of, row_of
from d2v_scale.interop.huggingface_row import Example
from d2v_scale.interop.task_heads import auto_class, head_of
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import parts_of
from d2v_scale.recipe import Recipe
from d2v_scale.tracking.record import AXES, METRICS_FILE, read_records

CARD_FILE = "README.md"
ONNX_FILE = "model.onnx"
"""What an ONNX export holds in place of weights."""
UNKNOWN_LICENSE = "unknown"
Target = Literal["hf", "safetensors", "fairseq", "onnx"]
LIBRARIES: dict[Target, str | None] = {"hf": "transformers", "safetensors": None, "fairseq": None, "onnx": "onnx"}
"""What the hub calls the library that loads it; None: of no kind that it knows."""
# A card that people have rewritten lacks it, and is theirs.
_MARK = "<!-- Written by tools/export.py. Without this line, a later export leaves the file alone. -->"


def write_card(
    checkpoint: Checkpoint,
    recipe: Recipe,
    modality: str | None,
    out: Path,
    weights: str,
    license_id: str,
    half: bool = False,
    to: Target = "hf",
) -> list[str]:
    """Write README.md beside what was exported; `modality`: None of a folder under our own names, which holds all;
    `half`: in float16; `to`: what for. Returns lines for the user. A README.md that people wrote stays."""
    path = out / CARD_FILE
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return [f"{path} is not ours, and stays as it is"]
    path.write_text(_card(checkpoint, recipe, modality, out, weights, license_id, half, to), encoding="utf-8")
    return []


def _card(
    checkpoint: Checkpoint,
    recipe: Recipe,
    modality: str | None,
    out: Path,
    weights: str,
    license_id: str,
    half: bool,
    to: Target,
) -> str:
    version = "2.0" if recipe.model.visible_only else "1.0"
    modalities = ", ".join(recipe.model.modalities if modality is None else parts_of(modality))
    what = "encoder" if recipe.task is None else "fine-tuned model"
    library = LIBRARIES[to]
    head = [f"library_name: {library}"] if library else []
    if modality is not None:
        head.append(f"pipeline_tag: {_pipeline(recipe, modality)}")
    tags = [f"- {tag}" for tag in ("data2vec", *modalities.split(", "))]
    rows = [
        ("recipe", recipe.name),
        ("steps", f"{checkpoint.step}"),
        ("weights", f"{_whose(weights, to)}{', stored in float16' if half else ''}"),
    ]
    rows += [("samples seen", f"{samples:,}")] if (samples := checkpoint.extra.get("samples")) else []
    rows += [("parameters", _sizes(recipe.model)), ("data", _data(recipe)), ("license", license_id)]
    if to == "fairseq":
        loading = _reference_lines(out)
    elif modality is None:
        loading = _own_lines(recipe)
    else:
        loading = _graph_lines(recipe, modality, out) if to == "onnx" else _lines(recipe, modality, out, half)
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
    known = name == "loss" or name.startswith(("knn_accuracy", "test/"))
    return known and name not in AXES and isinstance(value, (int, float)) and math.isfinite(value)


def _pipeline(recipe: Recipe, modality: str) -> str:
    if recipe.task is None:
        return row_of(recipe.model, modality).encoder_task
    return head_of(recipe.task, recipe.model, modality).pipeline


def _whose(weights: str, to: Target) -> str:
    return "the student's and the teacher's" if to == "fairseq" else f"the {weights}'s"


def _own_lines(recipe: Recipe) -> list[str]:
    """Of a folder under our own names."""
    further = "encoder.embed(...) takes what they read" if recipe.task is None else "`d2v probe` asks its head, too"
    lines = ["import d2v_scale", "", 'encoder = d2v_scale.load_encoder(".")']
    return [*lines, f"print(encoder.stems, encoder.depth, encoder.width)  # {further}"]


def _reference_lines(out: Path) -> list[str]:
    """Of one file in the reference's names, the newest."""
    file = max(out.glob("checkpoint.pt*"), key=lambda path: path.stat().st_mtime)
    return [
        *["from pathlib import Path", "", "from d2v_scale.interop.importing import open_source", ""],
        f'source = open_source(Path("{file.name}"))  # the reference\'s own program reads it as one of its own',
        'print(source.kind, len(source.student), "tensors of the student")',
    ]


def _lines(recipe: Recipe, modality: str, out: Path, half: bool) -> list[str]:
    """A program that loads the folder and runs it on a stand-in for the user's input."""
    model = recipe.model
    auto = auto_class(recipe.task, model, modality)
    options = "" if is_native(model, modality) else ", trust_remote_code=True"
    options += ", dtype=torch.float32" if half else ""
    result = "last_hidden_state" if auto == "AutoModel" else "logits"
    example = row_of(model, modality).example(model_of(model, modality), out)
    lines = _imports(example, [auto])
    lines.append(f'model = {auto}.from_pretrained("."{options}).eval()')
    run = f"    output = model({example.call}).{result}"
    return [*lines, *_prepared(example), "with torch.no_grad():", run, "print(output.shape)"]


def _graph_lines(recipe: Recipe, modality: str, out: Path) -> list[str]:
    """Likewise, of an ONNX graph."""
    row, model = row_of(recipe.model, modality), recipe.model.of(modality)
    example = row.example(model, out)
    lines = ["import numpy as np", "import onnxruntime", *_imports(example, [])]
    lines = [*dict.fromkeys(lines[:-1]), ""]
    lines += [f'session = onnxruntime.InferenceSession("{ONNX_FILE}")', *_prepared(example)]
    lines.append(f"inputs = dict({example.call})")
    _, arguments = row.sample(model, modality)
    mask = "attention_mask"
    if mask in arguments and arguments[mask].shape == arguments[row.input_name].shape:
        lines.append(f'inputs.setdefault("{mask}", torch.ones_like(inputs["{row.input_name}"]))  # all is real')
    types = "np.int64 if node.type == 'tensor(int64)' else np.float32"
    feed = f"{{node.name: np.asarray(inputs[node.name], {types}) for node in session.get_inputs()}}"
    return [*lines, f"output = session.run(None, {feed})[0]", "print(output.shape)"]


def _imports(example: Example, classes: list[str]) -> list[str]:
    lines = ["import numpy as np"] if "np." in example.given else []
    lines += ["import torch", *(["from PIL import Image"] if "Image." in example.given else [])]
    named = sorted({*classes, *example.processors})
    return [*lines, *([f"from transformers import {', '.join(named)}"] if named else []), ""]


def _prepared(example: Example) -> list[str]:
    own = ", trust_remote_code=True" if example.remote_processor else ""
    return [*(f'processor = {name}.from_pretrained("."{own})' for name in example.processors), example.given]
