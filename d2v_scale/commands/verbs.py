"""The program `d2v`: a table of verbs, and the module that each of them runs.

A module is imported when its verb is called, so that the list of verbs appears at once.
"""

import argparse
import difflib
import importlib
import os
import sys
from dataclasses import dataclass

import d2v_scale
from d2v_scale.errors import EXIT_BAD_INPUT


@dataclass(frozen=True)
class Verb:
    """A row of the table."""

    module: str
    """Of this package, with `main(arguments)`."""
    says: str
    """What it does, in a line."""
    on_cpu: bool = False
    """It computes little, and leaves the GPUs to others."""


VERBS = {
    "shards": Verb("make_shards", "folders of images, recordings, text or arrays to shards; the demo data"),
    "index": Verb("index_shards", "index existing shards, so that training on them is exact"),
    "inspect": Verb("inspect_shards", "look into shards: statistics, integrity, pictures"),
    "tokenizer": Verb("train_tokenizer", "train a sentencepiece tokenizer"),
    "plan": Verb("plan", "what a recipe costs on a cluster, and how to divide the work"),
    "train": Verb("start_training", "pretrain or fine-tune on this machine, on all its GPUs"),
    "submit": Verb("submit", "submit a training to Slurm"),
    "sweep": Verb("sweep", "a small grid over keys of a recipe, compared in a table"),
    "report": Verb("report", "a page about a run, or a comparison of several"),
    "draw": Verb("draw", "pictures of a run: curves, masks, neighbours, layers"),
    "sync": Verb("sync_mlflow", "send to MLflow what it does not have of a run yet"),
    "probe": Verb("probe", "what an encoder is worth on labelled shards"),
    "align": Verb("align", "is a word like its picture? pairs of modalities, measured with controls"),
    "extract": Verb("extract", "features of an encoder over shards, to shards or Parquet"),
    "export": Verb("export", "an encoder for Hugging Face, as safetensors, or in the reference's names", on_cpu=True),
    "import": Verb("import_weights", "a checkpoint of others to one of ours", on_cpu=True),
    "templates": Verb("lay_out_templates", "Slurm templates and DeepSpeed configurations into a folder"),
}


def make_parser() -> argparse.ArgumentParser:
    """The help of the whole program; it parses no verb's arguments."""
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:{width}}  {verb.says}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="d2v",
        usage="d2v VERB [ARGUMENTS]      d2v VERB --help",
        description=f"Pretraining large data2vec models.\n\nverbs:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"d2v_scale {d2v_scale.__version__}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the verb that comes first; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0].startswith("-"):
        parser = make_parser()
        parser.parse_args(given)
        parser.print_help(sys.stderr)
        return EXIT_BAD_INPUT
    name, *rest = given
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        remedy = f"Did you mean {near[0]!r}?" if near else "See d2v --help."
        print(f"error: {name!r} is no verb of d2v. {remedy}", file=sys.stderr)
        return EXIT_BAD_INPUT
    sys.argv[:] = [f"d2v {name}", *rest]  # what usage and errors call the program
    return run(name, rest)


def run(name: str, arguments: list[str]) -> int:
    """Run a verb in this process; returns its exit code."""
    verb = VERBS[name]
    if verb.on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return importlib.import_module(f"d2v_scale.commands.{verb.module}").main(arguments)
