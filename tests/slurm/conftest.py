"""A private cluster for all tests of this folder; they skip, with the install command, where Slurm is missing."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import INSTALL_COMMAND, Cluster, missing
from jobs import Program, Workplace

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    absent = missing()
    if absent:
        pytest.skip(f"no {', '.join(absent)} here; install with: {INSTALL_COMMAND}")
    if os.geteuid() != 0:
        pytest.skip("the private cluster starts jobs as root would: run as root, for instance in a container")
    directory = tmp_path_factory.mktemp("cluster")
    with Cluster(directory) as running:
        running.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        running.env |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "D2V_SCALE_MIN_FREE_GB": "0.5"}
        running.env |= {"SBATCH_GPUS_PER_NODE": "2", "PYTHONFAULTHANDLER": "1"}
        running.env.pop("OMP_NUM_THREADS", None)
        yield running


@pytest.fixture
def workplace(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[Program], Workplace]]:
    """Makes a copy of the repository to submit from, so that nothing is written into the real one."""
    made: list[Workplace] = []

    def make(program: Program) -> Workplace:
        made.append(Workplace(cluster, tmp_path / f"repository-{len(made)}", program, REPOSITORY))
        return made[-1]

    yield make
    for one in made:
        one.close()
