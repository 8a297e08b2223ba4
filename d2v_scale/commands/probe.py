"""Measure what an encoder is worth on labelled shards: a checkpoint, a run, an exported folder or imported weights.

  d2v probe runs/vit --data 'train/*.tar' --test 'test/*.tar' --task linear

knn: 20 nearest neighbours by cosine, of whitened features. linear: logistic regression, penalty chosen on a
fifth of the training samples. Both for every layer and for the mean of the last four; linear also for a learned
combination of all layers. attentive: a learned query attends to all positions of the last layer.

ctc: characters at every frame, from the `.txt` beside recordings; WER and CER. classify: a fine-tuned classifier's own
answers. A fine-tuned ctc model's own head is measured, too; on another encoder a linear one is trained.
"""

import argparse
import json
import sys

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_file
from d2v_scale.data.config import LETTERS
from d2v_scale.errors import EXIT_BAD_INPUT, UserError

TASKS = ("knn", "linear", "attentive", "ctc", "classify")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, a run directory (its newest checkpoint), an exported folder")
    parser.add_argument("--data", help="labelled training shards; default: the recipe's evaluation.train")
    parser.add_argument("--test", help="labelled held-out shards; default: the recipe's evaluation.test")
    parser.add_argument("--task", choices=TASKS, default="knn", help="what is measured")
    parser.add_argument("--letters", default=LETTERS, help="characters that a new ctc head predicts")
    parser.add_argument("--beam", type=int, help="width of the beam that ctc decodes with; default: the model's, or 1")
    parser.add_argument("--weights", choices=["teacher", "student", "random"], default="teacher", help="whose")
    parser.add_argument("--modality", metavar="NAME", help="stem, or source of paired samples, where there are several")
    parser.add_argument("--limit", type=int, help="at most this many samples of each set; default: all")
    parser.add_argument("--batch_size", type=int, default=64, help="samples at once")
    parser.add_argument("--k", type=int, default=20, help="neighbours (knn)")
    parser.add_argument("--out", type=out_file, help="write the result here as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Extract features, fit, print a table."""
    options = make_parser().parse_args(arguments)
    try:
        for name in ("beam", "k", "limit", "batch_size"):
            value = getattr(options, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}.", "Give at least 1.")
        from d2v_scale.evaluation.probing import ProbeOptions, print_table, probe

        asked = ProbeOptions(
            checkpoint=options.checkpoint,
            task=options.task,
            data=options.data,
            test=options.test,
            weights=options.weights,
            modality=options.modality,
            limit=options.limit,
            batch_size=options.batch_size,
            k=options.k,
            letters=options.letters,
            beam=options.beam,
        )
        result = probe(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print_table(result)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0
