"""Features of an encoder over shards, into shards or Parquet: one file for each shard that is read.

    d2v extract runs/vit 'shards/test-*.tar' features/                       # one process
    srun d2v extract runs/vit 'shards/{000000..000999}.tar' features/        # one process per task
    torchrun --nproc_per_node 8 -m d2v_scale extract runs/vit 'shards/*.tar' features/ --format shards --pool none

Processes take turns at the shards by RANK and WORLD_SIZE (or SLURM_PROCID and SLURM_NTASKS), each on the GPU of its
LOCAL_RANK (or SLURM_LOCALID). A file that is there is complete and is not made again, so an interrupted run continues
with any number of processes; _extract.json says of what encoder and shards the files are, and others are refused.
Samples that cannot be read are named, there ("lost"), too. A shard that is empty, cut off or cannot be read gets no
file: it is named as well ("without"), the files of the others are made, and the exit code is 3. A later call makes its
file if it can be read then.

Parquet: columns key, label (-1: none), features; the folder is one table (`pandas.read_parquet`). Shards: KEY.npy and
KEY.cls, with an index. Features are fp32 (D,), the mean over the layers and the valid positions, or with `--pool none`
fp16 (T, D), which Parquet has as fp32. Rows are in the order of the shard. To pad little, samples of 16 batches are
computed by length; the beginnings are read of those that are longer than the encoder reads. What is padded, positional
convolutions of speech encoders see beyond their first layer, as in the reference: where a vector must not depend on the
recordings beside it, `--batch_size 1`.
"""

import argparse
import sys

from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, a run directory or an exported folder")
    parser.add_argument("shards", help="indexed shards")
    parser.add_argument("out", type=out_folder, help="folder of the files")
    parser.add_argument("--format", choices=["parquet", "shards"], default="parquet", help="of the files")
    parser.add_argument("--pool", choices=["mean", "none"], default="mean", help="over the positions of a sample")
    parser.add_argument("--layers", type=int, nargs="+", default=[-1], help="main blocks that are averaged, from 0")
    parser.add_argument("--weights", choices=["teacher", "student", "random"], default="teacher", help="whose")
    parser.add_argument("--modality", metavar="NAME", help="stem, or source of paired samples, where there are several")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at once")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Make this process's files."""
    options = make_parser().parse_args(arguments)
    try:
        if options.batch_size < 1:
            raise UserError(f"--batch_size is {options.batch_size}.", "Give at least 1.")
        from d2v_scale.evaluation.extracting import Extraction, extract

        wanted = Extraction(
            shards=options.shards,
            out=options.out,
            form=options.format,
            pool=options.pool,
            layers=options.layers,
            modality=options.modality,
            batch_size=options.batch_size,
        )
        return extract(options.checkpoint, options.weights, wanted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
