"""Export an encoder, or a fine-tuned model: for Hugging Face, as plain safetensors, or in the reference's names.

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
from d2v_scale.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from d2v_scale.recipe import Recipe


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="run directory (its newest valid checkpoint) or checkpoint")
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--to", choices=("hf", "safetensors", "fairseq"), default="hf", help="what to write")
    parser.add_argument(
        "--weights",
        choices=("teacher", "student"),
        help="whose tensors; default: the teacher's, if there is one",
    )
    parser.add_argument("--modality", metavar="STEM", help="which one, where there are several")
    parser.add_argument("--tokenizer", type=Path, help="sentencepiece model; default: the one of the training data")
    parser.add_argument("--log_model", type=Path, metavar="RUN", help="also log it as a model of this run in MLflow")
    parser.add_argument(
        "--license", default=None, metavar="ID", help="of the weights, for the card, such as apache-2.0"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the export that the command line asks for."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.license is not None and (options.to == "fairseq" or not re.fullmatch(r"[\w.+-]+", options.license)):
        parser.error("--license needs --to hf or safetensors, and a name such as apache-2.0")
    for name in ("log_model", "tokenizer"):
        if getattr(options, name) is not None and options.to != "hf":
            parser.error(f"--{name} needs --to hf")
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
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.finetuning.predictor import TaskPredictor
    from d2v_scale.interop import exporting
    from d2v_scale.interop.encoder_source import recipe_of
    from d2v_scale.interop.export_check import LARGEST_DIFFERENCE, largest_difference, largest_logit_difference
    from d2v_scale.interop.model_card import UNKNOWN_LICENSE, write_card
    from d2v_scale.interop.paired_weights import require_one_stem, without_pairs
    from d2v_scale.interop.reference_export import export_reference

    checkpoint = open_any(options.checkpoint)
    recipe = recipe_of(checkpoint)
    if recipe.task is not None:
        if options.to == "fairseq":
            raise UserError("A fine-tuned model has no form of the reference's here.", "Use --to hf or safetensors.")
        if options.weights == "teacher":
            raise UserError("A fine-tuned model has no teacher.", "Leave --weights out.")
    weights: Literal["teacher", "student"] = options.weights or ("teacher" if recipe.task is None else "student")
    whose = "student and teacher" if options.to == "fairseq" else f"the {weights}"
    license_id = options.license or UNKNOWN_LICENSE
    if options.to == "safetensors":
        print(f"{checkpoint.path}: {recipe.name}, weights of {whose}")
        lines = exporting.export_safetensors(checkpoint, recipe, options.out, weights)
        print("\n".join(lines + write_card(checkpoint, recipe, None, options.out, weights, license_id)))
        print(f"wrote {options.out}")
        return 0
    require_one_stem(recipe, options.modality)
    modality = exporting.pick_modality(recipe, options.modality)
    checkpoint, recipe = without_pairs(checkpoint, recipe)
    with_tokenizer = modalities.class_of(recipe.model.kind(modality)).uses_tokenizer
    if options.tokenizer is not None and not with_tokenizer:
        raise UserError(f"An encoder of {modality} has no tokenizer.", "Leave --tokenizer out.")
    print(f"{checkpoint.path}: {recipe.name}, {modality}, weights of {whose}")
    if options.to == "fairseq":
        lines = export_reference(checkpoint, recipe, modality, options.out)
    else:
        tokenizer = options.tokenizer or (exporting.find_tokenizer(recipe) if with_tokenizer else None)
        lines = exporting.export_huggingface(checkpoint, recipe, modality, options.out, weights, tokenizer)
        lines += write_card(checkpoint, recipe, modality, options.out, weights, license_id)
    for line in lines:
        print(line)
    print(f"wrote {options.out}")
    if options.to != "hf":
        return 0
    if recipe.task is not None:
        difference = largest_logit_difference(TaskPredictor.load(checkpoint.path), options.out, modality)
    else:
        encoder = FrozenEncoder.load(checkpoint.path, weights)
        difference = largest_difference(encoder, options.out, modality, checkpoint)
    passed = difference <= LARGEST_DIFFERENCE
    print(f"largest difference to our model on the same input: {difference:.3g} {'PASS' if passed else 'FAIL'}")
    if passed and options.log_model is not None:
        print(f"logged as {log_model(options, recipe, modality, checkpoint.step)}")
    return 0 if passed else 1


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
