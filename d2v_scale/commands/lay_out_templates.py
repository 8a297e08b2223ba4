"""Copy what people start from into a folder of their own: templates for Slurm and DeepSpeed configurations.

    d2v templates my_cluster
    sbatch my_cluster/slurm/pretrain_large.sh --data '/shards/in1k-{000000..001281}.tar'

Nothing that is there is overwritten. A template runs the installed package; my_cluster/slurm/README.md explains the
settings of a site, my_cluster/ds_configs/README.md the configurations.
"""

import argparse
import shutil
import sys
from pathlib import Path

from d2v_scale import templates
from d2v_scale.answers.help_text import VerbParser
from d2v_scale.errors import EXIT_BAD_INPUT, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="made where it does not exist")
    parser.add_argument("--recipes", action="store_true", help="the recipes, too, to be changed and given as files")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Copy, and say what is where."""
    options = make_parser().parse_args(arguments)
    try:
        lay_out(options.folder, ["ds_configs", "slurm", *(["recipes"] if options.recipes else [])])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def lay_out(target: Path, names: list[str]) -> None:
    """Copy the folders with these names into `target`. Raises UserError, before anything is written, where one is
    there already."""
    there = next((target / name for name in names if (target / name).exists() or (target / name).is_symlink()), None)
    if there is not None:
        raise UserError(f"{there} exists already, and nothing is overwritten.", "Choose another folder, or remove it.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            left_out = shutil.ignore_patterns("site.env", "__pycache__")
            shutil.copytree(templates.folder(name), target / name, ignore=left_out)
            print(f"{target / name}: {templates.FOLDERS[name]}")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}.", "Choose another folder.") from error
