"""An encoder from wherever it is: a checkpoint or run directory, an exported folder, public weights of Hugging Face."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_scale.checkpoint import Checkpoint, open_any
from d2v_scale.errors import CheckpointError, DataError
from d2v_scale.interop.huggingface import huggingface_keys, is_native, model_of
from d2v_scale.interop.importing import open_source, without_prefixes
from d2v_scale.interop.keymap import KeyMap, import_tensors
from d2v_scale.interop.remote_code import MASKING, remote_code_keys
from d2v_scale.interop.task_heads import add_head
from d2v_scale.interop.weight_files import Folder
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256
from d2v_scale.model.init import full_shape_of, write_local
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.model.stem_config import parts_of
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict

log = logging.getLogger(__name__)

EXPORT_FILE = "d2v_scale.json"
"""In an exported folder: the recipe, and which checkpoint of which run it is."""

Weights = Literal["teacher", "student"]


@dataclass
class EncoderSource:
    """An encoder's recipe and tensors in our names."""

    path: Path
    recipe: Recipe
    read: Callable[[str], Tensor | None]
    """The fp32 tensor of a name; None where there is none."""
    step: int = 0
    run_dir: Path | None = None
    """The run that made it, where it is known."""
    classes: list[str] | None = None
    """Of a fine-tuned classifier: the names of its outputs."""
    tokenizer_sha256: str | None = None
    """Checksum of the tokenizer of the text that it was trained on, where it is known."""
    weights: Weights = "teacher"
    """Whose tensors they are, as far as there is a choice (`open_encoder`)."""


def open_encoder(
    path: str | Path, weights: Weights = "teacher", *, together: bool = False, checksums: bool = True
) -> EncoderSource:
    """Open any of the kinds above. Raises CheckpointError.

    `teacher`: averaged tensors from the teacher, shared ones (conv stack, embeddings) from the student; `student`: all
    from the student, and so is what a teacher that does not follow it (`TeacherConfig.kind`) trained. An exported
    folder holds one of the two, says which, and `weights` is without effect. `together`, `checksums`: as in `open_any`.
    """
    path = Path(path)
    if (path / "config.json").is_file() or (path / EXPORT_FILE).is_file():
        return _exported(path, weights)
    checkpoint = open_any(path, together=together, checksums=checksums)
    extra, recipe = checkpoint.extra, recipe_of(checkpoint)
    weights = weights if recipe.teacher.follows else "student"
    return EncoderSource(
        checkpoint.path,
        recipe,
        _reader(checkpoint, weights),
        checkpoint.step,
        checkpoint.path.parent.parent,
        extra.get("classes"),
        extra.get("tokenizer_sha256"),
        weights,
    )


def check_tokenizer(encoder: Path, of_encoder: str | None, shards: str, of_shards: str | None) -> None:
    """Raises DataError where the checksums of the two tokenizers are known and differ: ids would mean other pieces."""
    if of_encoder is not None and of_shards is not None and of_encoder != of_shards:
        raise DataError(
            f"{shards} is tokenised by another tokenizer (sha256 {of_shards[:12]}) than {encoder} was trained with "
            f"({of_encoder[:12]}).",
            "Index the shards again with `d2v index` --tokenizer and the encoder's tokenizer.",
        )


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The recipe a checkpoint was made with, as the checkpoint holds it. Raises CheckpointError."""
    values = checkpoint.extra.get("recipe")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint.path} does not say which recipe it was made with.")
    return parse_recipe(values, checkpoint.path)


def parse_recipe(values: dict[str, Any], path: Path) -> Recipe:
    """A recipe from plain values. Raises CheckpointError, which names `path`."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        sections = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        told = " ".join(str(error).split())
        if unknown := _unknown_key(told):
            raise CheckpointError(
                f"{path} was made with a recipe that has {unknown}, a key that this version does not know.",
                "Use the newer version that made it.",
            ) from error
        raise CheckpointError(f"{path} was made with a recipe that does not fit: {told.rstrip('.')}.") from error
    return Recipe(**{field.name: sections[field.name] for field in dataclasses.fields(Recipe)})


def _unknown_key(told: str) -> str | None:
    """The dotted key that the parser says it does not know; None where it says something else."""
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", told):
        return f"{found[1]}.{found[2]}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", told):
        section = re.search(r'Parser key "([^"]+)"', told)
        return f"{section[1]}.{found[1]}" if section else found[1]
    return None


def export_note(recipe: Recipe, checkpoint: Checkpoint, weights: str, stem: str | None = None) -> dict[str, Any]:
    """What EXPORT_FILE holds. `stem`: the one of several that the folder holds; None: all."""
    return {
        **({} if stem is None or recipe.model.modalities == [stem] else {"stem": stem}),
        "recipe": json.loads(json.dumps(to_dict(recipe))),
        "step": checkpoint.step,
        "weights": weights,
        "run_dir": str(checkpoint.path.resolve().parent.parent),
        "classes": checkpoint.extra.get("classes"),
        "tokenizer_sha256": checkpoint.extra.get("tokenizer_sha256"),
    }


def _reader(checkpoint: Checkpoint, weights: Weights) -> Callable[[str], Tensor | None]:
    order = ("teacher", "student") if weights == "teacher" else ("student",)
    held = {kind: set(checkpoint.names(kind)) for kind in order if kind in checkpoint.kinds()}

    def read(name: str) -> Tensor | None:
        kind = next((kind for kind, names in held.items() if name in names), None)
        return None if kind is None else checkpoint.tensor(kind, name)

    return read


def _exported(path: Path, weights: Weights) -> EncoderSource:
    if not (path / EXPORT_FILE).is_file():
        source = open_source(path)
        reference = source.reference
        ours, report = import_tensors(source.keymap, source.student)
        report.require_complete(str(path))
        _name_unread(path, source.notes)
        recipe = Recipe(name=path.name, model=reference.model, objective=reference.objective, data=source.data)
        known = None if source.tokenizer is None else tokenizer_sha256(source.tokenizer)
        return EncoderSource(path, recipe, ours.get, tokenizer_sha256=known, weights=weights)
    try:
        note = json.loads((path / EXPORT_FILE).read_text())
        recipe = parse_recipe(note["recipe"], path / EXPORT_FILE)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path / EXPORT_FILE} is damaged ({error}).", "Export it again.") from error
    if (stem := note.get("stem")) is not None:
        recipe = _of_stems(recipe, stem)
    tensors = Folder(path)
    _name_unread(path, tensors.notes)
    if (path / "config.json").is_file():
        ours, report = import_tensors(_keymap(recipe, stem), without_prefixes(tensors))
        if report.wrong:
            raise CheckpointError(f"{path} is damaged: {report.wrong[0]}.", "Export it again.")
    else:
        ours = dict(tensors)
    return EncoderSource(
        path,
        recipe,
        ours.get,
        note["step"],
        Path(note["run_dir"]),
        note.get("classes"),
        note.get("tokenizer_sha256"),
        note.get("weights", weights),
    )


def _of_stems(recipe: Recipe, sequence: str) -> Recipe:
    """The recipe with this stem alone, or with those of samples of several parts, which its sources then read."""
    if len(parts_of(sequence)) == 1:
        return dataclasses.replace(recipe, model=recipe.model.of(sequence), objective=recipe.objective.of(sequence))
    its = [source for source in recipe.data.sources if set(parts_of(sequence)) <= set(source.stems)]
    sources = [dataclasses.replace(source, modality=sequence) for source in its]
    data = dataclasses.replace(recipe.data, sources=sources)
    return dataclasses.replace(recipe, model=model_of(recipe.model, sequence), data=data)


def _name_unread(path: Path, notes: list[str]) -> None:
    for note in notes:
        log.warning("%s: %s", path, note)


def _keymap(recipe: Recipe, stem: str | None) -> KeyMap:
    model, modality = recipe.model, stem or recipe.model.modalities[0]
    if is_native(model, modality):
        keys = huggingface_keys(model, modality)
    else:
        with torch.device("meta"), undivided():
            names = [name for name, _ in Student(model).named_parameters()]
        keys = remote_code_keys(names, model, modality)
    if recipe.task is not None:
        add_head(keys, recipe.task, model, modality)
    return keys


def write_encoder(module: nn.Module, source: EncoderSource) -> None:
    """Copy every parameter of `module` but its head's from `source`, whatever holds them (ZeRO-3 shards, too). Local.

    Raises CheckpointError when one is nowhere to be found, or of another shape.
    """
    write_tensors(module, source, "head.")


@torch.no_grad()
def write_tensors(module: nn.Module, source: EncoderSource, but: str) -> None:
    """As `write_encoder`, of all parameters, or but those below the prefix `but`."""
    named = {name: p for name, p in module.named_parameters() if not but or not name.startswith(but)}
    missing = []
    for name, parameter in named.items():
        tensor = source.read(name)
        if tensor is None:
            if not name.endswith(MASKING):  # an encoder that was exported for fine-tuning may lack these
                missing.append(name)
            continue
        if tuple(tensor.shape) != full_shape_of(parameter):
            shapes = f"is {tuple(tensor.shape)}, the recipe's model has {full_shape_of(parameter)}"
            raise CheckpointError(f"{source.path}: {name} {shapes}.")
        write_local(parameter, tensor.float())
    if missing:
        raise CheckpointError(f"{source.path} lacks {len(missing)} of {len(named)} tensors: {', '.join(missing[:5])}.")
