"""Weights of other programs as our checkpoint's tensors and recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig
from d2v_scale.errors import CheckpointError, UserError
from d2v_scale.interop.golden import Fixture
from d2v_scale.interop.huggingface import PREFIXES, TIED, WRAPPERS, from_huggingface, row_of_kind
from d2v_scale.interop.keymap import KeyMap, KeyReport, import_tensors
from d2v_scale.interop.reference_config import from_fairseq
from d2v_scale.interop.reference_names import reference_keys, teacher_prefix
from d2v_scale.interop.reference_options import Reference
from d2v_scale.interop.reference_table import recognised
from d2v_scale.interop.reference_vision import from_data2vec_vision
from d2v_scale.interop.unpickling import load_pickle, plain
from d2v_scale.interop.weight_files import Folder, read_json
from d2v_scale.modalities.text.tokenizer import open_tokenizer, tokenizer_in, tokenizer_sha256
from d2v_scale.model.init import initial_values
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.model.stem_config import TextStem
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.recipe import Recipe, to_dict


@dataclass
class Source:
    """A foreign model: its description in our terms, and its tensors in its own names."""

    reference: Reference
    keymap: KeyMap
    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor] | None
    """In the student's names; None: the file has no teacher."""
    kind: str
    data: DataConfig = field(default_factory=DataConfig)
    """How its inputs were normalised, as far as it says so; the rest has its default."""
    notes: list[str] = field(default_factory=list)
    """What of it was not read, for the user."""
    tokenizer: Path | None = None
    """The one that lies beside the weights, and fits them."""


@dataclass
class Imported:
    """A foreign model in our names."""

    recipe: Recipe
    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    lines: list[str] = field(default_factory=list)
    """What happened, for the user."""
    tokenizer: Path | None = None
    """The one that lay beside the weights."""


def open_source(path: Path, state: str = "init") -> Source:
    """Look into a fairseq or data2vec_vision checkpoint, a Hugging Face folder, or a fixture folder.

    `state`: of a fixture folder, `init` or `final`. Raises `CheckpointError` when it is none of these or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_dir():
        if (path / "meta.json").exists():
            return _fixture(path, state)
        if (path / "config.json").exists():
            return _huggingface(path)
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".pt", ".pth"))
        raise CheckpointError(
            f"{path} holds neither config.json (Hugging Face) nor meta.json (a recorded run).",
            f"Give a file of it, such as {path / pickles[0]}." if pickles else "",
        )
    if path.suffix == ".safetensors" or path.name.startswith("pytorch_model"):
        raise CheckpointError(f"{path} is one file of a Hugging Face folder.", "Give the folder with its config.json.")
    return _pickled(path)


def convert(source: Source, name: str) -> Imported:
    """All tensors under our names. Raises `CheckpointError` listing every key that is missing, unexpected or does not
    fit."""
    reference = source.reference
    recipe = Recipe(name=name, model=reference.model, objective=reference.objective, teacher_parts=reference.parts)
    recipe.data = source.data
    with torch.device("meta"), undivided():
        student = Student(reference.model)
        teacher = Teacher(reference.model, reference.objective.target, reference.parts)
    shapes = {n: tuple(p.shape) for n, p in student.named_parameters()}
    imported, report = import_tensors(source.keymap, source.student, shapes)
    report.require_complete(f"{source.kind}, student")
    lines = [*source.notes, f"student: {report.line()}"]
    absent = [n for n in shapes if n not in imported]
    _require_known_absence(source.keymap, absent)
    if absent:
        imported |= initial_values(student, absent, recipe.seed)
        lines.append(f"student: initialised anew, since {source.kind} has none: {', '.join(absent)}")
    wanted = {n: tuple(p.shape) for n, p in teacher.named_parameters()}
    if source.teacher is None:
        teacher_tensors = {n: imported[n] for n in wanted}
        lines.append("teacher: none in the file; it starts as a copy of the student")
    else:
        teacher_tensors, teacher_report = _teacher(source, wanted)
        lines.append(f"teacher: {teacher_report.line()}")
    if source.tokenizer is not None:
        lines.append(f"tokenizer: {source.tokenizer}")
    return Imported(recipe, imported, teacher_tensors, lines, source.tokenizer)


def _teacher(source: Source, wanted: dict[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], KeyReport]:
    assert source.teacher is not None
    tensors, report = import_tensors(source.keymap, source.teacher, wanted)
    report.require_complete(f"{source.kind}, teacher")
    return tensors, report


def _require_known_absence(keymap: KeyMap, absent: list[str]) -> None:
    optional = {entry.ours for entry in keymap.entries if entry.optional}
    unknown = [name for name in absent if name not in optional and not name.startswith(keymap.initialised or ("\0",))]
    if unknown:
        raise CheckpointError("the file has nothing for these tensors:\n" + "\n".join(f"  {n}" for n in unknown))


def extra_of(imported: Imported, path: Path) -> dict[str, Any]:
    """What the checkpoint stores beside the tensors."""
    known = {} if imported.tokenizer is None else {"tokenizer_sha256": tokenizer_sha256(imported.tokenizer)}
    return {"recipe": json.loads(json.dumps(to_dict(imported.recipe))), "imported_from": path.name, **known}


def _fixture(path: Path, state: str) -> Source:
    fixture = Fixture(path)
    student, teacher = fixture.student_init, fixture.teacher_init
    if state == "final":
        student = fixture.tensors("student_final")
        teacher = {fixture.teacher_prefix + k: t for k, t in fixture.tensors("teacher_final").items()}
    return Source(fixture.reference, fixture.keymap, student, teacher, "recorded run")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _pickled(path: Path) -> Source:
    content = load_pickle(path)
    state = content.get("model", content)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: its 'model' is no state dict.")
    student = {_alias(k): t for k, t in state.items() if isinstance(t, Tensor)}
    nested = [t for k, t in state.items() if k.split(".")[-1] == "_ema" and isinstance(t, Mapping)]
    averaged = nested[0] if nested else content.get("model_ema")
    teacher = None
    if isinstance(averaged, Mapping):
        teacher = {k: t for k, t in averaged.items() if isinstance(t, Tensor) and not k.startswith("__")}
    row, second = recognised(student)
    if not second and not row.first_is_fairseq:
        arguments = plain(content.get("args")) or {}
        reference = from_data2vec_vision(content.get("model_settings") or {}, arguments, _shapes(student))
        kind = "data2vec_vision checkpoint"
    else:
        reference = from_fairseq(_fairseq_settings(content, path), _shapes(student), _words(content))
        kind = "fairseq checkpoint"
    keymap = reference_keys(reference.model, reference.modality)
    if teacher is not None:
        prefix = teacher_prefix(keymap, teacher)
        teacher = {prefix + key: tensor for key, tensor in teacher.items()}
    source = Source(reference, keymap, student, teacher, kind)
    settings = plain(content.get("cfg"))
    task = settings.get("task") if isinstance(settings, dict) else None
    if isinstance(task, dict) and "normalize" in task:
        source.data.speech.normalize = bool(task["normalize"])
    return source


def _alias(key: str) -> str:
    # Some versions wrapped the projection in a Sequential.
    return key.replace("final_proj.0.", "final_proj.")


def _words(content: Mapping[str, Any]) -> dict[str, int] | None:
    words = content.get("special_words")
    return words if isinstance(words, dict) else None


def _fairseq_settings(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    settings = plain(content.get("cfg")) or {}
    model = settings.get("model") if isinstance(settings, dict) else None
    if not isinstance(model, dict):
        model = plain(content.get("args"))
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{path} has no model configuration (cfg.model or args): the number of heads cannot be told from tensors.",
            "Give the checkpoint as the training program wrote it.",
        )
    return model


def _huggingface(path: Path) -> Source:
    settings = read_json(path / "config.json")
    if settings.get("quantization_config"):
        raise CheckpointError(f"{path} is quantised.", "Give the folder it was made from, in 16 or 32 bits.")
    folder = Folder(path)
    tensors = without_prefixes(folder)
    if TIED[0] not in tensors and TIED[1] in tensors:
        tensors[TIED[0]] = tensors[TIED[1]]
    reference, keymap = from_huggingface(settings, _shapes(tensors))
    notes = [*folder.notes, *row_of_kind(reference.model, reference.modality).fold(tensors)]
    source = Source(reference, keymap, tensors, None, "Hugging Face folder", notes=notes)
    if modalities.class_of(reference.model.kind(reference.modality)).uses_tokenizer:
        _read_tokenizer(path, source)
    _read_preprocessor(path / "preprocessor_config.json", source.data)
    return source


def _read_tokenizer(path: Path, source: Source) -> None:
    """The ids that config.json is silent about, <unk> and <mask>, are the tokenizer's."""
    if (file := tokenizer_in(path)) is None:
        return
    stem = source.reference.model.sole(TextStem)
    try:
        tokenizer = open_tokenizer(file)
        tokenizer.require_special_ids()
        theirs = replace(stem, unk_id=tokenizer.special_ids.unk, mask_id=tokenizer.special_ids.mask)
        tokenizer.check(theirs)
    except UserError as error:
        source.notes.append(f"tokenizer: left behind, since it does not fit the weights: {error}")
        return
    stem.unk_id, stem.mask_id = theirs.unk_id, theirs.mask_id
    source.tokenizer = file


def _read_preprocessor(path: Path, data: DataConfig) -> None:
    """How a Hugging Face model's waveforms or images were normalised, where the folder says it."""
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text())
        normalizes = bool(values.get("do_normalize", True))
        data.speech.normalize = normalizes
        if not normalizes:
            data.vision.mean, data.vision.std = [0.0] * 3, [1.0] * 3
        elif "image_mean" in values:
            data.vision.mean, data.vision.std = list(values["image_mean"]), list(values["image_std"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}.", "Take it from the model's folder again.") from error


def without_prefixes(folder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The folder's tensors by their names in the encoder, without what wrappers and task models put before them.

    Raises CheckpointError where two tensors would have one name.
    """
    outer = ""
    while wrapper := next((w for w in WRAPPERS if folder and all(key.startswith(outer + w) for key in folder)), ""):
        outer += wrapper
    tensors: dict[str, Tensor] = {}
    for key in folder:
        inner = key.removeprefix(outer)
        name = next((inner.removeprefix(prefix) for prefix in PREFIXES if inner.startswith(prefix)), inner)
        if name in tensors:
            raise CheckpointError(
                f"two tensors are the encoder's {name}, one of them {key}.", "Leave the one that was trained."
            )
        tensors[name] = folder[key]
    return tensors
