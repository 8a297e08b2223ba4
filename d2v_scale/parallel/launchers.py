"""Who started this process, and as which of how many: Slurm's, Open MPI's and PMI's variables as torch's own.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; `srun` and `mpirun` say the
same under other names. `adopt` is the one place that translates. Standard library only.
"""

import logging
import os
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from d2v_scale.errors import ConfigError

log = logging.getLogger(__name__)

_MPI_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
_FIRST_PORT, _PORTS = 20000, 5000
_RESERVED_STEPS = 0xFFFF0000
"""Slurm numbers the steps of batch scripts, interactive shells and containers of the job from here on."""

_ON_NODE = "D2V_SCALE_NUMBER_ON_NODE"

_LAUNCH = "Start the processes with `deepspeed`, `torchrun`, `srun` or `mpirun`, which say who is who"
_ALONE = "`unset RANK WORLD_SIZE` to train in one process"


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str = ""
    """Who says so, in words; "" for a process on its own."""


ALONE = Place(0, 1, 0)


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of this run as torch's variables say it. WORLD_SIZE without RANK is a leftover of some shell."""
    return int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 1


def number_on_node(environment: Mapping[str, str] = os.environ) -> int:
    """This process among those of its node, from 0; LOCAL_RANK is the number of its GPU among those that it sees."""
    return int(environment.get(_ON_NODE, environment.get("LOCAL_RANK", "0")))


def adopt(environment: MutableMapping[str, str] = os.environ) -> Place:
    """Find this process's place, and say it in torch's variables (RANK, WORLD_SIZE, ...), in `environment` itself.

    A process that nobody started together with others gets none of them, whatever is left in the shell. Raises
    ConfigError for variables that contradict each other or do not say enough.
    """
    if "RANK" in environment:
        return _as_torch_says(environment)
    place = started_as(environment)
    stated = environment.pop("WORLD_SIZE", None)
    if stated is not None and stated != str(place.world_size):
        count = "one process" if place.world_size == 1 else f"a world of {place.world_size}, as {place.launcher} says"
        log.warning(
            "WORLD_SIZE=%s is set without RANK, left by something else: it is ignored. This is %s.", stated, count
        )
    if place.world_size == 1:
        return place
    if place.launcher.startswith("Slurm"):
        address, port = _slurm_address(environment), _slurm_port(environment)
    else:
        address, port = _mpi_address(environment, place), _mpi_port(environment)
    # Slurm may show each task a GPU of its own, which is its first.
    alone_on_gpu = re.fullmatch(r"[^,\s]+", environment.get("CUDA_VISIBLE_DEVICES", "")) is not None
    environment["RANK"], environment["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    environment["LOCAL_RANK"] = "0" if alone_on_gpu else str(place.local_rank)
    environment[_ON_NODE] = str(place.local_rank)
    here = _slurm_local_size(environment) if place.launcher.startswith("Slurm") else _mpi_local_size(environment)
    if here is None:
        environment.pop("LOCAL_WORLD_SIZE", None)
    else:
        environment["LOCAL_WORLD_SIZE"] = here
    environment["MASTER_ADDR"] = address
    environment.setdefault("MASTER_PORT", str(port))
    if place.rank == 0:
        where = f"{address}:{environment['MASTER_PORT']}"
        log.info("%d processes, as %s says; they meet at %s", place.world_size, place.launcher, where)
    return place


def started_as(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place by what a launcher other than torch's says; `ALONE` without one. Raises ConfigError."""
    for name, prefix in (("Open MPI", "OMPI_COMM_WORLD_"), ("MVAPICH", "MV2_COMM_WORLD_")):
        if f"{prefix}RANK" in environment:
            return _place(environment, name, f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK")
    step = _slurm_step(environment)
    # mpirun may start its helpers with srun, whose variables its processes inherit.
    if "PMI_RANK" in environment and "PMI_SIZE" in environment:
        if step is not None and (environment["PMI_RANK"], environment["PMI_SIZE"]) == (
            str(step.rank),
            str(step.world_size),
        ):
            return step
        local = next((name for name in ("MPI_LOCALRANKID", "PMI_LOCAL_RANK") if name in environment), "LOCAL_RANK")
        return _place(environment, "PMI", "PMI_RANK", "PMI_SIZE", local)
    if step is not None:
        return step
    rank = environment.get("SLURM_PROCID", "0")
    if rank != "0":
        raise ConfigError(
            "SLURM_PROCID",
            f"is {rank}, but SLURM_STEP_ID does not say that `srun` started this process: it would do on its own "
            "what its peers do as well",
            f"{_LAUNCH}, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.",
        )
    if environment.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in environment:
        log.warning(
            "Slurm has %s tasks for this job, but `srun` did not start this process: it is alone.",
            environment["SLURM_NTASKS"],
        )
    return ALONE


def _as_torch_says(environment: MutableMapping[str, str]) -> Place:
    if "WORLD_SIZE" not in environment:
        raise ConfigError(
            "WORLD_SIZE", "is not set, but RANK is", f"{_LAUNCH}, or `unset RANK` to train in one process."
        )
    environment.setdefault("LOCAL_RANK", "0")
    place = _place(environment, "the environment", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and place.world_size == 1:
        del environment["RANK"], environment["WORLD_SIZE"]
    elif missing:
        raise ConfigError(
            " and ".join(missing),
            f"missing, but RANK={place.rank} and WORLD_SIZE={place.world_size} are set",
            f"{_LAUNCH}, or {_ALONE}.",
        )
    return place


def _place(environment: Mapping[str, str], launcher: str, rank: str, size: str, local: str) -> Place:
    numbers = {}
    for name in (rank, size, local):
        value = environment.get(name)
        if value is None or not value.isdecimal():
            raise ConfigError(
                name, "is not set" if value is None else f"is {value!r}, no number", f"{_LAUNCH}, or {_ALONE}."
            )
        numbers[name] = int(value)
    if not numbers[rank] < numbers[size]:
        raise ConfigError(rank, f"is {numbers[rank]}, but {size} is {numbers[size]}", f"{_LAUNCH}, or {_ALONE}.")
    return Place(numbers[rank], numbers[size], numbers[local], launcher)


def _slurm_step(environment: Mapping[str, str]) -> Place | None:
    """The place of a task that `srun` started. A batch script and a shell have Slurm's numbers too, but no peers."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID", ""))
    if "SLURM_PROCID" not in environment or not step.isdecimal() or int(step) >= _RESERVED_STEPS:
        return None
    if "SLURM_PTY_PORT" in environment and _has_terminal():
        return None  # `srun --pty bash`
    size = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environment), "SLURM_NPROCS")
    launcher = f"Slurm (job {environment.get('SLURM_JOB_ID', '?')}, step {step})"
    return _place(environment, launcher, "SLURM_PROCID", size, "SLURM_LOCALID")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _slurm_address(environment: Mapping[str, str]) -> str:
    """Where task 0 runs: the step's first node. Not where srun was called, which may be a login node."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    names = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    launched_from = environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    several = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES", "1")) != "1"
    if not several and first_host(names) in ("", names):
        return "127.0.0.1"
    first = first_host(names)
    for candidate in (first, _node_address(first), launched_from):
        if candidate and _is_known(candidate):
            return candidate
    raise ConfigError(
        "MASTER_ADDR",
        f"is not set, and the address of {first or 'the first node'} cannot be found",
        "Set MASTER_ADDR to the address of the node that runs rank 0 before `srun`.",
    )


def first_host(names: str) -> str:
    """`n001` of Slurm's list `n[001-004,7],m1`; "" of none."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", names)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else ""


def _node_address(name: str) -> str:
    try:
        command = ["scontrol", "--oneliner", "show", "node", name]
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"\bNodeAddr=(\S+)", told)
    return found.group(1) if found else ""


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _slurm_local_size(environment: Mapping[str, str]) -> str | None:
    """Tasks of the step on this node, of which Slurm has a list such as `8(x3),4`; None where it does not say."""
    listed = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    node = environment.get("SLURM_NODEID", "")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", listed)
    sizes = [size for size, nodes in runs for _ in range(int(nodes or 1))]
    return sizes[int(node)] if node.isdecimal() and int(node) < len(sizes) else None


def _mpi_local_size(environment: Mapping[str, str]) -> str | None:
    return next((environment[name] for name in _MPI_LOCAL_SIZES if name in environment), None)


def _slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all tasks find by themselves, and other jobs and steps on the node and earlier attempts do not."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restarts = (int(value) if (value := environment.get(name, "")).isdecimal() else 0 for name in names)
    return _FIRST_PORT + (job * 7 + step * 3 + restarts) % _PORTS * 2


def _mpi_address(environment: Mapping[str, str], place: Place) -> str:
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if _mpi_local_size(environment) == str(place.world_size):
        return "127.0.0.1"
    raise ConfigError(
        "MASTER_ADDR",
        f"is not set, and {place.launcher} does not say on which node rank 0 of {place.world_size} runs",
        "Give it: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 (Open MPI) or -genv MASTER_ADDR HOST (others).",
    )


def _mpi_port(environment: Mapping[str, str]) -> int:
    names = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "PBS_JOBID", "LSB_JOBID", "SLURM_JOB_ID")
    job = next((environment[name] for name in names if name in environment), "")
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS * 2
