"""Turn a fairseq or data2vec_vision checkpoint, or a Hugging Face Data2Vec folder, into a d2v_scale checkpoint.

d2v import checkpoint.pt out/checkpoint
"""

import argparse
import sys
import warnings
from pathlib import Path

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("source", type=Path, help=".pt or .pth file, Hugging Face folder, or folder of a recorded run")
    parser.add_argument("out", type=out_folder, help="directory to write the checkpoint into")
    parser.add_argument("--state", choices=("init", "final"), default="init", help="which state of a recorded run")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the conversion that the command line asks for."""
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="megatron")
    from d2v_scale.checkpoint import write_single
    from d2v_scale.interop.importing import convert, extra_of, open_source
    from d2v_scale.modalities.text.tokenizer import copy_tokenizer
    from d2v_scale.parallel.groups import single_process

    try:
        single_process()
        source = open_source(options.source, options.state)
        imported = convert(source, options.source.resolve().stem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(
        f"{source.kind}: data2vec {'2.0' if imported.recipe.model.visible_only else '1.0'} {source.reference.modality}"
    )
    for line in imported.lines:
        print(line)
    written = write_single(options.out, imported.student, imported.teacher, extra_of(imported, options.source))
    print(f"wrote {written}")
    if imported.tokenizer is not None:
        print(f"wrote {copy_tokenizer(imported.tokenizer, options.out)}: what `d2v shards text` --tokenizer takes")
    return 0
