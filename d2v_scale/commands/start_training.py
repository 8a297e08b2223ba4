"""Pretrain a model, or fine-tune one, on this machine: a process for each of its GPUs, or one where it has none.

    d2v train --recipe demo_vision
    d2v train --ranks 2 --recipe d2v2_vision_base --data 'shards/train-*.tar' --run_dir runs/vit

Every argument but those below is the training program's; `d2v train --help_all` explains them. With --restarts N the
processes are started again after a fault. Signals reach all processes: TERM, INT and USR1 save and end, USR2 asks for
a profile. The exit code is theirs (0 done, 2 bad input, 10 stopped and saved, others in the documentation). Several
machines: `d2v submit`, or `deepspeed`, `srun`, `mpirun`, each of which may start `d2v train`, too, which then is one of
their processes; or `d2v train --meet DIR` once on each machine, which restarts over all of them, with spare ones
(--spares; docs/faults.md).
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

from d2v_scale.agents import joining
from d2v_scale.answers.help_text import HelpFormatter
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.parallel import launchers, local_ranks
from d2v_scale.process import doing
from d2v_scale.programs.own_program import TRAINING
from d2v_scale.running.restarts import Restarts

RANKS = "processes; default: the number of GPUs, 1 without any"
RESTARTS = "after a crash, hang or lost process: so often for each without a new checkpoint; default: 0, with spares 3"
SPARES = "with --meet: of its nodes so many wait to take a lost one's place; default: 0"
MEET = "directory that all nodes share, whose file `nodes` has a line NAME ADDRESS for each"
NODE = "with --meet: this node's name there; default: Slurm's, or the host's"


def make_parser() -> argparse.ArgumentParser:
    """The options that are not the training program's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s [--ranks N] [--restarts N] [--meet DIR] [--KEY VALUE ...]",
    )
    parser.add_argument("--ranks", type=int, help=RANKS)
    parser.add_argument("--restarts", type=int, help=RESTARTS)
    parser.add_argument("--meet", type=Path, metavar="DIR", help=MEET)
    parser.add_argument("--spares", type=int, default=0, help=SPARES)
    parser.add_argument("--node", metavar="NAME", help=NODE)
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

            own = [("ranks N", RANKS), ("restarts N", RESTARTS), ("meet DIR", MEET), ("spares N", SPARES)]
            print(help_screen(for_training, own))
            return 0
        if {"--help_all", "--list_recipes", "--print_config"} & {*for_training}:
            return local_ranks.become([*_program(), *for_training], environment)
        # `srun` starts one launcher on each node, which then are no ranks.
        if "RANK" in environment or (options.meet is None and launchers.started_as(environment).world_size > 1):
            for name in ("ranks", "restarts", "meet", "spares", "node"):
                if getattr(options, name):
                    raise UserError(f"--{name} is given to a process that a launcher has started.", "Leave it out.")
            return local_ranks.become([*_program(), *for_training], environment)
        restarts = _restarts(options)
        if options.meet is not None:
            return _join(options, restarts, for_training, environment)
        ranks, gpus = local_ranks.choose_ranks(options.ranks, environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [*_program(), *for_training]
    if restarts:
        with tempfile.TemporaryDirectory(prefix="d2v_launcher_") as folder:
            deciding = Restarts(restarts, Path(folder), for_training)
            environment |= deciding.environment
            return local_ranks.run(
                command,
                ranks,
                environment,
                share_cores=gpus == 0,
                again=deciding.again,
                is_saving=deciding.is_saving,
            )
    if ranks == 1:
        return local_ranks.become(command, environment)
    return local_ranks.run(command, ranks, environment, share_cores=gpus == 0)


def _restarts(options: argparse.Namespace) -> int:
    """How often ranks are started again for each kind of fault. Raises UserError for options that contradict."""
    if options.node and options.meet is None:
        raise UserError(f"--node is {options.node}, but nobody is to be met.", "Give --meet, or leave it out.")
    if options.spares and options.meet is None:
        raise UserError(f"--spares is {options.spares}, but there are no other nodes.", "Give --meet, or `d2v submit`.")
    restarts: int = options.restarts if options.restarts is not None else 3 if options.spares else 0
    if restarts < 0:
        raise UserError(f"--restarts is {restarts}.", "Give 0 or more.")
    if options.spares and not restarts:
        raise UserError("--restarts is 0: a spare node takes its place in a restart.", "Give 1 or more.")
    return restarts


def _join(options: argparse.Namespace, restarts: int, for_training: list[str], environment: dict[str, str]) -> int:
    """Be this machine's launcher among others. Raises UserError."""
    if options.ranks is None:
        raise UserError("--meet is given without --ranks.", "Say how many processes every machine has.")
    problem = ""
    try:
        _, gpus = local_ranks.choose_ranks(options.ranks, environment)
    except UserError as error:  # this machine's alone, perhaps: others can do without it, and will name it
        if options.ranks < 1:
            raise
        gpus, problem = options.ranks, str(error)
    if gpus == 0:
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", local_ranks.own_threads(options.ranks))
    node = options.node or joining.own_name(environment)
    meeting = (options.meet, node, options.spares, restarts)
    return joining.join(*meeting, _program(), for_training, options.ranks, environment, problem)


def _program() -> list[str]:
    return [sys.executable, "-u", str(TRAINING)]
