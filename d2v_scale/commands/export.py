"""Export an encoder, or a fine-tuned model: for Hugging Face, as plain safetensors, as an ONNX graph, or in the
reference's names.

d2v export runs/vit out/vit --to hf
"""

import argparse
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from d2v_scale.recipe import Recipe


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="run directory (its newest valid checkpoint) or checkpoint")
    parser.add_argument("out", type=out_folder, help="folder to write into")
    parser.add_argument("--to", choices=("hf", "safetensors", "fairseq", "onnx"), default="hf", help="what to write")
    parser.add_argument(
        "--weights",
        choices=("teacher", "student"),
        help="whose tensors; default: the teacher's, if one follows the student",
    )
    parser.add_argument("--modality", metavar="NAME", help="stem, or source of paired samples, where there are several")
    parser.add_argument("--half", action="store_true", help="store the weights in float16")
    parser.add_argument("--opset", type=int, metavar="N", help="of --to onnx; default: 18, the lowest there is")
    parser.add_argument("--tokenizer", type=Path, help="of texts; default: the one of the training data")
    parser.add_argument("--log_model", type=Path, metavar="RUN", help="also log it as a model of this run in MLflow")
    parser.add_argument(
        "--license", default=None, metavar="ID", help="of the weights, for the card, such as apache-2.0"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the export that the command line asks for."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.license is not None and not re.fullmatch(r"[\w.+-]+", options.license):
        parser.error("--license needs a name such as apache-2.0")
    for name, formats in (("log_model", ("hf",)), ("tokenizer", ("hf", "onnx")), ("opset", ("onnx",))):
        if getattr(options, name) is not None and options.to not in formats:
            parser.error(f"--{name} needs --to {' or '.join(formats)}")
    if options.to == "safetensors" and options.modality is not None:
        parser.error("--to safetensors writes all modalities: leave --modality out")
    if options.to == "fairseq" and options.weights is not None:
        parser.error("--to fairseq writes student and teacher: leave --weights out")

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def run(options: argparse.Namespace) -> int:
    """Write the folder, say what is in it, and for Hugging Face prove that it computes the same."""
    from d2v_scale import modalities
    from d2v_scale.checkpoint import open_any
    from d2v_scale.interop import export_check, exporting, onnx_export
    from d2v_scale.interop.encoder_source import recipe_of
    from d2v_scale.interop.model_card import UNKNOWN_LICENSE, write_card
    from d2v_scale.interop.paired_weights import require_one_input, without_pairs
    from d2v_scale.interop.reference_export import export_reference

    checkpoint = open_any(options.checkpoint)
    recipe = recipe_of(checkpoint)
    weights = _chosen_weights(options, recipe, checkpoint.path)
    whose = "student and teacher" if options.to == "fairseq" else f"the {weights}"
    license_id = options.license or UNKNOWN_LICENSE
    if options.to == "safetensors":
        print(f"{checkpoint.path}: {recipe.name}, weights of {whose}")
        lines = exporting.export_safetensors(checkpoint, recipe, options.out, weights, options.half)
        lines += write_card(checkpoint, recipe, None, options.out, weights, license_id, options.half, options.to)
        print("\n".join([*lines, f"wrote {options.out}"]))
        if not options.half:
            return 0
        return 0 if _passes(export_check.pairs_of_ours(checkpoint.path, options.out, weights), half=True) else 1
    modality = exporting.pick_sequence(recipe, options.modality)
    if options.to != "hf":
        require_one_input(recipe.model, modality, options.to)
    checkpoint, recipe = without_pairs(checkpoint, recipe)
    with_tokenizer = modalities.of(recipe.model, modality).uses_tokenizer
    if options.tokenizer is not None and not with_tokenizer:
        raise UserError(f"An encoder of {modality} has no tokenizer.", "Leave --tokenizer out.")
    print(f"{checkpoint.path}: {recipe.name}, {modality}, weights of {whose}")
    if options.to == "fairseq":
        lines = export_reference(checkpoint, recipe, modality, options.out, options.half)
    else:
        tokenizer = exporting.chosen_tokenizer(checkpoint, recipe, options.tokenizer) if with_tokenizer else None
        given = (checkpoint, recipe, modality, options.out, weights, tokenizer)
        if options.to == "onnx":
            opset = onnx_export.FIRST_OPSET if options.opset is None else options.opset
            lines = onnx_export.export_onnx(*given, opset=opset, half=options.half)
        else:
            lines = exporting.export_huggingface(*given, half=options.half)
    lines += write_card(checkpoint, recipe, modality, options.out, weights, license_id, options.half, options.to)
    for line in lines:
        print(line)
    print(f"wrote {options.out}")
    if options.to == "onnx" or (options.to == "fairseq" and not options.half):
        return 0
    if options.to == "fairseq":
        pairs = export_check.reference_pairs(checkpoint.path, options.out, modality)
    else:
        pairs = export_check.exported_pairs(checkpoint, recipe.task, options.out, modality, weights)
    passed = _passes(pairs, options.half)
    if passed and options.log_model is not None:
        print(f"logged as {log_model(options, recipe, modality, checkpoint.step)}")
    return 0 if passed else 1


def _chosen_weights(options: argparse.Namespace, recipe: "Recipe", checkpoint: Path) -> Literal["teacher", "student"]:
    """Whose tensors are written. Raises UserError for those that this checkpoint does not have."""
    if recipe.task is not None:
        if options.to == "fairseq":
            raise UserError("A fine-tuned model has no form of the reference's here.", "Use --to hf or safetensors.")
        if options.weights == "teacher":
            raise UserError("A fine-tuned model has no teacher.", "Leave --weights out.")
    if not recipe.teacher.follows and (options.weights == "teacher" or options.to == "fairseq"):
        raise UserError(
            f"The teacher of {checkpoint} does not follow its student (teacher.kind {recipe.teacher.kind}).",
            "Leave --weights out, which exports the student, and do not give --to fairseq.",
        )
    chosen: Literal["teacher", "student"] | None = options.weights
    return chosen or ("teacher" if recipe.task is None and recipe.teacher.follows else "student")


def _passes(pairs: "list[tuple[Tensor, Tensor]]", half: bool) -> bool:
    """Print how far the outputs of each pair differ, and whether that is little enough."""
    from d2v_scale.interop import export_check

    difference = export_check.largest(pairs, relative=half)
    limit = export_check.limit_of(half)
    passed = difference <= limit
    what = f"relative difference to our model on the same input (float16 may have {limit:g})" if half else ""
    what = what or "difference to our model on the same input"
    print(f"largest {what}: {difference:.3g} {'PASS' if passed else 'FAIL'}")
    return passed


def log_model(options: argparse.Namespace, recipe: "Recipe", modality: str, step: int) -> str:
    """The URI of the MLflow model, logged to the run that `--log_model` names. Raises UserError if there is none."""
    from d2v_scale.interop import mlflow_model
    from d2v_scale.tracking.mirror_state import MirrorState, tracking_uri

    state = MirrorState.load(options.log_model)
    if not state.run_id:
        raise UserError(f"{options.log_model} has no run in MLflow.", "Run `d2v sync` on it first.")
    uri = tracking_uri(options.log_model)
    return mlflow_model.log_model(
        options.out, recipe.model, modality, recipe.task, tracking_uri=uri, run_id=state.run_id, step=step
    )
