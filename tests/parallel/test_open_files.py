"""Every peer is a socket: worlds that need more open files than a shell's usual limit, and more than a node allows."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.parallel import open_files

WORLD = 64

# One small process a rank, forked after the imports. The world's own group opens nothing, as NCCL's sockets are few.
AGREEING = """
import json, os, socket, sys
import torch, torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from d2v_scale.parallel import open_files
from d2v_scale.process.signals import Agreement

world = int(sys.argv[1])
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
allowed = open_files.raise_limit()
read, write = os.pipe()
for rank in range(world):
    if os.fork() == 0:
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
        dist.init_process_group("fake", store=store, rank=rank, world_size=world)
        agreement = Agreement()
        agreement.agree(None)
        agreement.agree(None)
        agreement.barrier()
        files = len(os.listdir("/proc/self/fd"))
        os.write(write, (json.dumps([rank, allowed, files]) + "\\n").encode())
        agreement.barrier()
        os._exit(0)
codes = [os.wait()[1] for _ in range(world)]
os.close(write)
sys.stdout.write(os.fdopen(read).read())
sys.exit(max(codes) != 0)
"""


def limited(soft: int, hard: int):  # type: ignore[no-untyped-def]
    """For a child: before it starts, and for all that it starts."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_sixty_four_ranks_agree_under_a_soft_limit_of_128(tmp_path: Path) -> None:
    """Rank 0 needs 148 descriptors: gloo ended with "too many open files" at the first agreement."""
    (tmp_path / "agreeing.py").write_text(AGREEING)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.getenv("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "agreeing.py"), str(WORLD)],
        env=environment,
        preexec_fn=limited(128, 1024),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {rank: (allowed, files) for rank, allowed, files in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(range(WORLD))
    for rank, (allowed, files) in found.items():
        assert allowed == 1024
        # 148 on rank 0: more than its soft limit was.
        assert (128 if rank == 0 else WORLD) < files <= open_files.needed(rank, WORLD)


def test_the_soft_limit_goes_up_to_the_hard_one_and_never_down() -> None:
    program = "from d2v_scale.parallel import open_files; print(open_files.raise_limit(), open_files.problem(0, 2))"
    for soft, hard, expected in ((64, 300, 300), (300, 300, 300), (64, 80, 80)):
        done = subprocess.run(
            [sys.executable, "-c", program], preexec_fn=limited(soft, hard), capture_output=True, text=True
        )
        assert done.stdout.split(" ")[0] == str(expected), done.stderr
        told = "rank 0 of 2 needs 88 open files, the hard limit (ulimit -Hn) is 80"
        assert done.stdout.strip().endswith(told) == (hard < 88)


def test_preflight_refuses_a_world_that_a_node_cannot_hold_by_number_and_node(tmp_path: Path) -> None:
    report_file = tmp_path / "preflight.json"
    command = [
        sys.executable,
        "-m",
        "d2v_scale.running.preflight",
        "--run_dir",
        str(tmp_path),
        "--report",
        str(report_file),
    ]
    base = {**os.environ, "WORLD_SIZE": "200", "LOCAL_RANK": "0", "RANK": "0", "DS_ACCELERATOR": "cpu"}
    base |= {"D2V_SCALE_NODES": " ".join(f"n{k}" for k in range(25)), "SLURMD_NODENAME": "n0", "MASTER_PORT": "0"}
    done = subprocess.run(
        [*command, "--wait_s", "1", "--min_free_gb", "0.001"],
        env=base,
        preexec_fn=limited(128, 400),
        capture_output=True,
        text=True,
        timeout=240,  # it would wait longer for 25 nodes if it were not told how long
    )
    report = json.loads(report_file.read_text())
    assert done.returncode == report["exit_code"], done.stderr[-2000:]
    assert "rank 0 of 200 needs 484 open files, the hard limit (ulimit -Hn) is 400" in report["bad_nodes"]["n0"]


def test_a_start_without_preflight_is_refused_too(tmp_path: Path) -> None:
    """Before any group is formed, with the name of the host."""
    program = (
        "import sys; from d2v_scale.parallel import groups\n"
        "from d2v_scale.errors import UserError\n"
        "try: groups.initialize()\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "RANK": "7", "WORLD_SIZE": "1000", "DS_ACCELERATOR": "cpu", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        preexec_fn=limited(128, 1024),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "rank 7 of 1000 needs 1076 open files, the hard limit (ulimit -Hn) is 1024 on " in done.stdout, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_thousand_ranks_need_what_was_counted_at_sixty_four(rank: int) -> None:
    assert open_files.needed(rank, 1024) - open_files.needed(rank, 64) == (2 if rank == 0 else 1) * 960
