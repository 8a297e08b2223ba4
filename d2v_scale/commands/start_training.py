"""Pretrain a model, or fine-tune one, on this machine: a process for each of its GPUs, or one where it has none.

    d2v train --recipe demo_vision
    d2v train --ranks 2 --recipe d2v2_vision_base --data 'shards/train-*.tar' --run_dir runs/vit

Every argument but --ranks and --restarts is the training program's; `d2v train --help_all` explains them. With
--restarts N the processes are started again after a fault. Signals reach all processes: TERM, INT and USR1 save and
end, USR2 asks for a profile. The exit code is theirs (0 done, 2 bad input, 10 stopped and saved, others in the
documentation). Several machines: `d2v submit`, or `deepspeed`, `srun`, `mpirun`, each of which may start `d2v train`,
too, which then is one of their processes.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from d2v_scale.answers.help_text import HelpFormatter
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.parallel import launchers, local_ranks
from d2v_scale.process import doing
from d2v_scale.programs.own_program import TRAINING
from d2v_scale.running.restarts import Restarts

RANKS = "processes; default: the number of GPUs, 1 without any"
RESTARTS = "after a crash, hang or lost process: so often for each without a new checkpoint; default: 0"


def make_parser() -> argparse.ArgumentParser:
    """The options that are not the training program's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s [--ranks N] [--restarts N] [--KEY VALUE ...]",
    )
    parser.add_argument("--ranks", type=int, help=RANKS)
    parser.add_argument("--restarts", type=int, default=0, help=RESTARTS)
    parser.add_argument("-h", "--help", action="store_true", help="show the keys that are often changed")
    parser.add_argument("--help_all", action="store_true", help="explain every key of a recipe")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Become the training program, or start it several times; returns its exit code."""
    options, for_training = make_parser().parse_known_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(doing.__name__).setLevel(logging.INFO)
    launchers.log.setLevel(logging.ERROR)  # a batch script is alone among its job's tasks, and may start ranks
    try:
        environment = dict(os.environ)
        if options.help_all:
            print(make_parser().format_help(), flush=True)
            for_training.append("--help_all")
        elif options.help:
            from d2v_scale.command_line import help_screen

            print(help_screen(for_training, [("ranks N", RANKS), ("restarts N", RESTARTS)]))
            return 0
        if {"--help_all", "--list_recipes", "--print_config"} & {*for_training}:
            return local_ranks.become([*_program(), *for_training], environment)
        if "RANK" in environment or launchers.started_as(environment).world_size > 1:
            if options.ranks is not None:
                raise UserError("--ranks is given to a process that a launcher has started.", "Leave it out.")
            if options.restarts:
                raise UserError("--restarts is given to a process that a launcher has started.", "Leave it out.")
            return local_ranks.become([*_program(), *for_training], environment)
        if options.restarts < 0:
            raise UserError(f"--restarts is {options.restarts}.", "Give 0 or more.")
        ranks, gpus = local_ranks.choose_ranks(options.ranks, environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [*_program(), *for_training]
    if options.restarts:
        with tempfile.TemporaryDirectory(prefix="d2v_launcher_") as folder:
            restarts = Restarts(options.restarts, Path(folder), for_training)
            environment |= restarts.environment
            return local_ranks.run(
                command,
                ranks,
                environment,
                share_cores=gpus == 0,
                again=restarts.again,
                is_saving=restarts.is_saving,
            )
    if ranks == 1:
        return local_ranks.become(command, environment)
    return local_ranks.run(command, ranks, environment, share_cores=gpus == 0)


def _program() -> list[str]:
    return [sys.executable, "-u", str(TRAINING)]
