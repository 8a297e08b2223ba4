"""Preflight with real processes on this machine that pose as nodes n1 and n2."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from d2v_scale import errors
from d2v_scale.running.preflight import Findings, disk_problems, local_shards, shard_problems, summarise

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def launch(tmp_path: Path, *options: str, absent: int | None = None) -> tuple[int, dict]:
    """Two nodes with one rank each; exit code of rank 0 and the report. `absent`: a rank that never comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    report = tmp_path / "logs/preflight.json"
    base = {**os.environ, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    base |= {"D2V_SCALE_NODES": "n1 n2", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "d2v_scale.running.preflight", "--run_dir", str(tmp_path), "--report", str(report)]
    command += ["--min_free_gb", "0.001", *options]
    ranks = [
        subprocess.Popen(command, env={**base, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"})
        for rank in range(2)
        if rank != absent
    ]
    codes = [rank.wait(60) for rank in ranks]
    return codes[0], json.loads(report.read_text())


def test_fit_nodes_pass_with_a_bandwidth_and_a_clock_skew(tmp_path: Path) -> None:
    code, report = launch(tmp_path)
    assert (code, report["bad_nodes"], report["problem"]) == (errors.EXIT_DONE, {}, "")
    assert report["allreduce_gb_per_s"] > 0
    assert 0 <= report["clock_skew_s"] < 1
    assert (report["nodes"], report["ranks"]) == (2, 2)


def test_a_node_that_does_not_come_is_named(tmp_path: Path) -> None:
    code, report = launch(tmp_path, "--wait_s", "3", absent=1)
    assert code == errors.EXIT_REQUEUE
    assert report["bad_nodes"] == {"n2": ["rank 1 did not report"]}


def test_missing_shards_are_the_users_mistake(tmp_path: Path) -> None:
    code, report = launch(tmp_path, "--data", str(tmp_path / "none-{0..3}.tar"))
    assert code == errors.EXIT_BAD_INPUT
    assert set(report["bad_nodes"]) == {"n1", "n2"}
    assert "none-" in report["text"]


def test_the_node_that_differs_from_the_others_is_bad() -> None:
    odd = Findings(2, "n3", {**VERSIONS, "torch": "2.11.0"}, ["only 1.0 GB free in /runs, 20 wanted"])
    report = summarise([Findings(0, "n1", VERSIONS), Findings(1, "n2", VERSIONS), odd], ["n1", "n2", "n3"])
    assert report.bad_nodes == {"n3": ["only 1.0 GB free in /runs, 20 wanted", "torch 2.11.0 instead of 2.13.0"]}
    assert report.exit_code == errors.EXIT_REQUEUE
    assert report.text.startswith("preflight: n3: only 1.0 GB")


def test_shards_are_opened(tmp_path: Path) -> None:
    good = tmp_path / "good.tar"
    with tarfile.open(good, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    assert shard_problems([str(good)], 0, 1) == []
    assert "not a tar file" in shard_problems([str(tmp_path / "bad.tar")], 0, 1)[0]
    assert "No such file" in shard_problems([str(tmp_path / "gone.tar")], 0, 1)[0]


def test_all_ranks_together_look_at_different_shards(tmp_path: Path) -> None:
    shards = [str(tmp_path / f"{index}.tar") for index in range(64)]
    seen = {problem for rank in range(8) for problem in shard_problems(shards, rank, 8)}
    assert len(seen) == 24


@pytest.mark.parametrize("pattern", ["{0..2}.tar", "*.tar", ""])
def test_patterns_name_the_shards(tmp_path: Path, pattern: str) -> None:
    for index in range(3):
        with tarfile.open(tmp_path / f"{index}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    files, problem = local_shards(f"{tmp_path}/{pattern}")
    assert problem == ""
    assert [Path(file).name for file in files] == ["0.tar", "1.tar", "2.tar"]
    both, problem = local_shards(f"vision={tmp_path}/{{0,1}}.tar,speech={tmp_path}/2.tar,text=https://host/3.tar")
    assert problem == ""
    assert [Path(file).name for file in both] == ["0.tar", "1.tar", "2.tar"]


def test_stems_of_arrays_and_paired_samples_name_their_shards_as_others(tmp_path: Path) -> None:
    """Only vision, speech and text were known: what a stem of arrays named was looked for as `ecg=...`."""
    for index in range(2):
        with tarfile.open(tmp_path / f"{index}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.npy"), io.BytesIO())
    files, problem = local_shards(f"ecg={tmp_path}/0.tar,vision+text={tmp_path}/1.tar")
    assert (problem, [Path(file).name for file in files]) == ("", ["0.tar", "1.tar"])


def test_disk_that_is_too_small(tmp_path: Path) -> None:
    assert disk_problems(tmp_path, 0.0) == []
    assert "1e+09 wanted" in disk_problems(tmp_path, 1e9)[0]
    assert list(tmp_path.iterdir()) == []
