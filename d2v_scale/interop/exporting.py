"""A checkpoint's encoder as files of other programs, and the proof that they compute the same."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.checkpoint import Checkpoint
from d2v_scale.checkpoint.format import MANIFEST
from d2v_scale.errors import CheckpointError, DataError
from d2v_scale.files import open_as_usual
from d2v_scale.interop.encoder_source import EXPORT_FILE, export_note
from d2v_scale.interop.half import halved, require_half
from d2v_scale.interop.huggingface import REMEDY, huggingface_keys, huggingface_settings, is_native, model_of, row_of
from d2v_scale.interop.keymap import export_tensors
from d2v_scale.interop.remote_code import MASKING, modelling_files, remote_code_keys, remote_code_settings
from d2v_scale.interop.task_heads import add_head, head_settings, prefixed
from d2v_scale.interop.weight_files import write_json
from d2v_scale.modalities.text.tokenizer import tokenizer_file, tokenizer_in, tokenizer_sha256
from d2v_scale.model.stem_config import parts_of, sequence_of
from d2v_scale.recipe import Recipe
from d2v_scale.shards.shard_set import find_shards

Weights = Literal["teacher", "student"]
FILE_BYTES = 2 << 30
"""A new weights file is begun after this many bytes, which bounds the memory that is needed."""


@dataclass
class ChosenWeights:
    """Reads one tensor at a time: the teacher's where it has one, else the student's; or the student's only."""

    checkpoint: Checkpoint
    weights: Weights
    taken: Counter[str] = field(default_factory=Counter)
    """How many tensors came from where."""
    student_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        held = self.checkpoint.kinds()
        if "student" not in held or (self.weights == "teacher" and "teacher" not in held):
            raise CheckpointError(f"{self.checkpoint.path} has no {self.weights}.", "Choose --weights accordingly.")
        self._teacher = set(self.checkpoint.names("teacher")) if self.weights == "teacher" else set()
        self._student = set(self.checkpoint.names("student"))

    def __call__(self, name: str) -> Tensor | None:
        """The tensor `name` in fp32; None if neither has it."""
        kind = "teacher" if name in self._teacher else "student" if name in self._student else None
        if kind is None:
            return None
        self.taken[kind] += 1
        if kind == "student":
            self.student_names.append(name)
        return self.checkpoint.tensor(kind, name)

    def lines(self) -> list[str]:
        """Which tensors are whose."""
        lines = [f"{self.taken['teacher']} tensors are the teacher's, {self.taken['student']} the student's"]
        if self.weights == "teacher" and self.student_names:
            groups = sorted({_group(name) for name in self.student_names})
            lines.append(f"the student's (shared with the teacher, not averaged): {', '.join(groups)}")
        return lines


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:3] if parts[0] == "stems" else parts[:2])


def pick_modality(recipe: Recipe, wanted: str | None) -> str:
    """The modality to export. Raises `CheckpointError` if it must be chosen and was not, or is not there."""
    modalities = recipe.model.modalities
    if wanted is None and len(modalities) == 1:
        return modalities[0]
    if wanted not in modalities:
        raise CheckpointError(f"the checkpoint has stems for {', '.join(modalities)}.", "Choose one with --modality.")
    assert wanted is not None
    return wanted


def pick_sequence(recipe: Recipe, wanted: str | None) -> str:
    """Likewise, where it may be the sequence that the parts of paired samples make: by the name of the source that it
    was trained on, or by its stems, as `vision+text`, in any order; some of them alone, too."""
    trained = {
        name: source.stems
        for name, source in zip(recipe.data.source_names(), recipe.data.sources, strict=True)
        if len(source.stems) > 1
    }
    if wanted is not None and wanted not in recipe.model.modalities:
        named = trained.get(wanted, parts_of(wanted))
        for stems in trained.values():
            if len(named) > 1 and set(named) <= set(stems):
                return sequence_of(stem for stem in stems if stem in named)
    if trained and wanted not in recipe.model.modalities:
        joint = ", ".join(f"{name!r} ({' with '.join(stems)})" for name, stems in trained.items())
        there = ", ".join(recipe.model.modalities)
        raise CheckpointError(
            f"the checkpoint has stems for {there}, and was trained on samples of {joint}.",
            "Choose one of these names with --modality.",
        )
    return pick_modality(recipe, wanted)


def export_huggingface(
    checkpoint: Checkpoint,
    recipe: Recipe,
    modality: str,
    out: Path,
    weights: Weights,
    tokenizer: Path | None,
    half: bool = False,
) -> list[str]:
    """Write a folder that `AutoModel` loads: a native class where one computes this model, else our modelling file.
    `half`: weights in float16.

    Returns lines that say what was written. Raises `CheckpointError`.
    """
    chosen = ChosenWeights(checkpoint, weights)
    native = is_native(recipe.model, modality)
    if native:
        keymap = huggingface_keys(recipe.model, modality)
        settings = huggingface_settings(recipe.model, modality)
    else:
        keymap = remote_code_keys(checkpoint.names("student"), recipe.model, modality)
        settings = remote_code_settings(recipe.model, modality)
    task = recipe.task
    if task is not None:
        add_head(keymap, task, recipe.model, modality)
        settings |= head_settings(task, recipe.model, modality, checkpoint.extra.get("classes"))
    held = _of_encoder(checkpoint, recipe, modality)
    keymap.require_all(held, "a Hugging Face folder", REMEDY)
    if half:
        require_half(_all_of(ChosenWeights(checkpoint, weights), held))
        settings["dtype"] = "float16"
    out.mkdir(parents=True, exist_ok=True)
    # First what can be refused, a tokenizer of another size; then the weights.
    row, model = row_of(recipe.model, modality), model_of(recipe.model, modality)
    processor_lines = row.write_processor(recipe, model, out, tokenizer)
    tensors = export_tensors(keymap, chosen)
    if task is not None:
        tensors = ((prefixed(name, recipe.model, modality), tensor) for name, tensor in tensors)
    write_tensors(halved(tensors) if half else tensors, out)
    lines = chosen.lines()
    if not native:
        files = modelling_files(recipe.model, modality)
        for file in files:
            shutil.copyfile(file, out / file.name)
        lines.append(f"no class of transformers computes this model: {files[0].name} does (trust_remote_code=True)")
    write_json(out / "config.json", settings)
    write_json(out / EXPORT_FILE, export_note(recipe, checkpoint, weights, modality))
    return lines + processor_lines


def _of_encoder(checkpoint: Checkpoint, recipe: Recipe, modality: str) -> list[str]:
    """Names of the student's tensors that are this encoder's, or its head's."""
    own, others = tuple(f"stems.{stem}." for stem in parts_of(modality)), ("stems.", "predictors.")
    held = [n for n in checkpoint.names("student") if n.startswith(own) or not n.startswith(others)]
    unmasked = row_of(recipe.model, modality).names_are_ours
    return [n for n in held if not (unmasked and n.endswith(MASKING))]


def export_safetensors(
    checkpoint: Checkpoint, recipe: Recipe, out: Path, weights: Weights, half: bool = False
) -> list[str]:
    """Write all chosen tensors under our own names, and the recipe. `half`: in float16."""
    names = checkpoint.names("student")
    if half:
        require_half(_all_of(ChosenWeights(checkpoint, weights), names))
    chosen = ChosenWeights(checkpoint, weights)
    out.mkdir(parents=True, exist_ok=True)
    tensors = _all_of(chosen, names)
    write_tensors(halved(tensors) if half else tensors, out)
    write_json(out / EXPORT_FILE, export_note(recipe, checkpoint, weights))
    return chosen.lines()


def _all_of(chosen: ChosenWeights, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = chosen(name)
        assert tensor is not None
        yield name, tensor


def write_tensors(tensors: Iterator[tuple[str, Tensor]], out: Path) -> None:
    """model.safetensors, or several files and an index when they are large; no more than one file is in memory."""
    where: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    files = 0
    total = 0

    def flush() -> None:
        nonlocal files
        files += 1
        part = out / f"part-{files:05d}.safetensors"
        save_file(pending, part, metadata={"format": "pt"})
        open_as_usual(part)
        pending.clear()

    for old in [*out.glob("model*.safetensors"), *out.glob("model.safetensors.index.json")]:
        old.unlink()
    for name, tensor in tensors:
        pending[name] = tensor.contiguous().clone()
        where[name] = files + 1
        total += tensor.nbytes
        if sum(t.nbytes for t in pending.values()) >= FILE_BYTES:
            flush()
    if pending:
        flush()
    if files == 1:
        (out / "part-00001.safetensors").rename(out / "model.safetensors")
        return
    names = {i: f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(1, files + 1)}
    for i, name in names.items():
        (out / f"part-{i:05d}.safetensors").rename(out / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in where.items()}}
    write_json(out / "model.safetensors.index.json", index)


def chosen_tokenizer(checkpoint: Checkpoint, recipe: Recipe, given: Path | None) -> Path | None:
    """The tokenizer to export: the given one, or what `find_tokenizer` finds. Raises DataError for another than that of
    the training data."""
    sha256 = checkpoint.extra.get("tokenizer_sha256")
    if given is None:
        return find_tokenizer(recipe, checkpoint.path, sha256)
    path = tokenizer_file(given)
    if sha256 is not None and path.is_file() and tokenizer_sha256(path) != sha256:
        raise DataError(
            f"{path} is another tokenizer than {checkpoint.path} was trained with (sha256 {sha256[:12]}).",
            "Give that one with --tokenizer: ids would mean other pieces.",
        )
    return path


def find_tokenizer(recipe: Recipe, holder: Path, sha256: str | None) -> Path | None:
    """The tokenizer of an encoder: in its own folder, `holder`, where it came with the weights, or that of the training
    data; None where it is not there any more. `sha256`: its checksum, where that is known."""
    found = (path for path in _tokenizers(recipe, holder) if path.is_file())
    return next((path for path in found if sha256 in (None, tokenizer_sha256(path))), None)


def _tokenizers(recipe: Recipe, holder: Path) -> Iterator[Path]:
    # Imported weights are a folder with one checkpoint.
    own = tokenizer_in(holder) or (tokenizer_in(holder.parent) if (holder / MANIFEST).is_file() else None)
    if own is not None:
        yield own
    named = recipe.data.text.tokenizer
    of_ids = {stem.name for stem in modalities.stems(recipe.model) if stem.uses_tokenizer}
    if named is not None:
        with suppress(DataError):  # it is not there any more
            yield tokenizer_file(Path(named))
        return
    for source in recipe.data.sources:
        with suppress(DataError):  # likewise the shards
            if set(source.stems) & of_ids and (path := find_shards(source).tokenizer) is not None:
                yield path
