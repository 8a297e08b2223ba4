"""Be a node's launcher: read who takes part, and look after the node's ranks until all is over."""

import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.agents.agent import LOST_S, Agent
from d2v_scale.agents.leading import LOST, STUCK_S, Leader
from d2v_scale.agents.meeting import Directory
from d2v_scale.agents.own_ranks import Devices, OwnRanks
from d2v_scale.checkpoint.memory_files import forget_run
from d2v_scale.errors import UserError
from d2v_scale.running.attempts import Attempt, decide
from d2v_scale.running.restarts import Restarts

log = logging.getLogger("d2v_scale.train")

NODES_FILE = "nodes"
"""In the directory where launchers meet: a line `NAME ADDRESS [WHY IT CANNOT TRAIN]` for each node, those first that
train first."""
SCRIPT_NODE = "D2V_SCALE_SCRIPT_NODE"
"""Environment: the node of the job's script, which requeues the job if that is to be done."""
LOST_NODE = "D2V_SCALE_LOST_NODE_S"
"""Environment: in place of `LOST_S`."""
_LEAST_LOST_S = 5.0
_POLL_S, _POLL_S_PER_NODE, _MOST_POLL_S = 0.1, 0.005, 1.0


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job. `addresses`: by name and in order; `unfit`: those that are not to train, and why."""

    addresses: Mapping[str, str]
    unfit: Mapping[str, str]


def read_nodes(folder: Path) -> Nodes:
    """The nodes of a meeting in `folder`. Raises UserError."""
    file = folder / NODES_FILE
    try:
        lines = [line.split(maxsplit=2) for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"--meet {folder}: {file} cannot be read ({error.strerror}).",
            "Give a directory that all nodes share, in which the file `nodes` has a line `NAME ADDRESS` for each.",
        ) from error
    names = [line[0] for line in lines]
    if not lines or min(len(line) for line in lines) < 2 or len({*names}) < len(names):
        raise UserError(f"{file} does not have one line `NAME ADDRESS` for each node.", "Each name may come once.")
    unfit = {line[0]: line[2] for line in lines if len(line) > 2}
    return Nodes({name: address for name, address, *_ in lines}, unfit)


def own_name(environment: Mapping[str, str] = os.environ) -> str:
    """This node's name where none is given."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def lost_after(environment: Mapping[str, str]) -> float:
    """Seconds after which a silent launcher is lost. Raises UserError."""
    said = environment.get(LOST_NODE, str(LOST_S))
    with contextlib.suppress(ValueError):
        # Later, ranks that cannot be ended would be blamed for what a lost node holds up.
        if _LEAST_LOST_S <= float(said) <= STUCK_S:
            return float(said)
    raise UserError(f"{LOST_NODE} is {said!r}.", f"Give seconds, {_LEAST_LOST_S:g} to {STUCK_S:g}.")


def _entered(folder: Path, node: str) -> Directory:
    """The meeting in `folder`, which this node comes to for the first time. Raises UserError."""
    meeting = Directory(folder)
    try:
        meeting.enter(node)
    except FileExistsError as error:
        remedy = "Give each start a directory of its own, with its `nodes`."
        raise UserError(f"--meet {folder}: {node} has been there before.", remedy) from error
    except OSError as error:
        problem = f"--meet {folder}: it takes no file ({error.strerror})."
        raise UserError(problem, "Give a directory that can be written.") from error
    return meeting


def requeue(environment: Mapping[str, str]) -> None:
    """In place of a job's script that was lost with its node: Slurm would call the job failed, or wait for ever."""
    job, array = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_ARRAY_JOB_ID")
    if array:  # one of its elements has the array's own number as its job's, by which Slurm means all of them
        job = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        log.error("Job %s is not requeued (%s): submit again with --resume.", job, problem)


def join(
    folder: Path,
    node: str,
    spares: int,
    restarts: int,
    command: list[str],
    arguments: Sequence[str],
    ranks: int,
    environment: Mapping[str, str],
    problem: str = "",
) -> int:
    """Train on this node with the launchers of others that meet in `folder`; the exit code of all. Main thread only.

    `spares`: how many of the nodes are left over at first; `restarts`: how often for each kind of fault without a new
    checkpoint between; `command` with `arguments`: of the training program; `ranks`: on each node; `problem`: why this
    one cannot have them. Raises UserError.
    """
    nodes = read_nodes(folder)
    if node not in nodes.addresses:
        raise UserError(f"--node {node} is none of {folder / NODES_FILE}.", f"It has {', '.join(nodes.addresses)}.")
    if not 0 <= spares < len(nodes.addresses):
        raise UserError(
            f"--spares is {spares}, and there are {len(nodes.addresses)} nodes.", "At least one of them has to train."
        )
    lost_s = lost_after(environment)
    meeting = _entered(folder, node)
    deciding = Restarts(restarts, folder, arguments)
    own = OwnRanks([*command, *arguments], ranks, environment, deciding)
    script = environment.get(SCRIPT_NODE, "")
    leader = Leader([*nodes.addresses], len(nodes.addresses) - spares, deciding, nodes.unfit, script)
    devices = Devices(ranks, environment, problem)
    agent = Agent(node, nodes.addresses, meeting, own, leader, problem=devices.problem, lost_s=lost_s)
    poll_s = min(_MOST_POLL_S, _POLL_S + _POLL_S_PER_NODE * len(nodes.addresses))
    with own.group.signals():
        while (code := agent.step()) is None:
            time.sleep(poll_s)
    devices.end()
    if agent.leads and agent.plan is not None and agent.plan.excluded.get(script) == LOST:
        requeue(environment)
    directory = deciding.directory
    if directory is not None and not decide([Attempt(code, "", -1)], 2).requeue:
        forget_run(directory)
    if agent.plan is not None and agent.plan.why:
        log.warning("%s: %s", node, agent.plan.why)
    return code
