"""Looks at every node before the training starts: `python -m d2v_scale.running.preflight --run_dir DIR --report FILE`.

One process per rank, started by srun (or with RANK, WORLD_SIZE, LOCAL_RANK). Each checks its own node; then they meet,
and rank 0 writes the report: which node has which problem, and how fast an all-reduce is. Exit code of rank 0: 0, or 10
if some nodes are bad and others could do the work, or 2 if all nodes have the problem, which is then the user's.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from d2v_scale.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_REQUEUE, DataError
from d2v_scale.parallel import open_files

PACKAGES = ("torch", "deepspeed", "megatron-core")
SHARDS_PER_RANK = 3
MAX_CLOCK_SKEW_S = 2.0
WAIT_S, WAIT_S_PER_NODE = 60.0, 1.0
"""How long to wait for the slowest node: more of them load the same file system, and one is slower than all others."""
ALL_REDUCE_S, ALL_REDUCE_S_PER_NODE = 30.0, 0.5
"""Longest time for setting up a group and for its all-reduces."""


@dataclass
class Findings:
    """What one rank found on its node. `clock`: Unix time just after all ranks met."""

    rank: int
    node: str
    versions: dict[str, str]
    problems: list[str] = field(default_factory=list)
    clock: float = 0.0


@dataclass
class Report:
    """Rank 0's summary. `problem` is one that no single node is to blame for."""

    bad_nodes: dict[str, list[str]]
    problem: str = ""
    ranks: int = 0
    nodes: int = 0
    allreduce_gb_per_s: float | None = None
    clock_skew_s: float | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        if not self.bad_nodes and not self.problem:
            return EXIT_DONE
        return EXIT_REQUEUE if len(self.bad_nodes) < self.nodes else EXIT_BAD_INPUT

    @property
    def text(self) -> str:
        """One line for status.json."""
        named = "; ".join(f"{node}: {', '.join(problems)}" for node, problems in sorted(self.bad_nodes.items()))
        return "preflight: " + ("; ".join(filter(None, (named, self.problem))) or "all nodes are fit")


def versions() -> dict[str, str]:
    """Python and the packages whose versions must agree over all nodes."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def disk_problems(run_dir: Path, min_free_gb: float) -> list[str]:
    """A run directory that takes no file or has less than `min_free_gb` left, and a full local temporary directory."""
    problems = []
    probe = run_dir / f".preflight-{socket.gethostname()}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        problems.append(f"cannot write to {run_dir}: {error.strerror}")
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    for directory, wanted_gb in ((run_dir, min_free_gb), (temporary, 0.1)):
        try:
            free_gb = shutil.disk_usage(directory).free / 1e9
        except OSError as error:
            problems.append(f"{directory}: {error.strerror}")
            continue
        if free_gb < wanted_gb:
            problems.append(f"only {free_gb:.1f} GB free in {directory}, {wanted_gb:g} wanted")
    return problems


def shard_problems(shards: list[str], rank: int, world_size: int) -> list[str]:
    """Shards that cannot be read or are no tar files; each rank looks at a few, all ranks together at many."""
    problems = []
    mine = shards[rank % len(shards) :: max(1, min(world_size, len(shards)))] if shards else []
    for path in mine[:SHARDS_PER_RANK]:
        try:
            with open(path, "rb") as file:
                header = file.read(512)
        except OSError as error:
            problems.append(f"cannot read {path}: {error.strerror}")
            continue
        if header[257:262] != b"ustar":
            problems.append(f"{path} is not a tar file")
    return problems


def local_shards(data: str) -> tuple[list[str], str]:
    """(files, problem) of train.py's `--data`: one pattern, or one for each of several stems. URLs are left out."""
    from d2v_scale.data.config import DataConfig, SourceConfig
    from d2v_scale.run_files.raw_data import shards_or_command
    from d2v_scale.shards.patterns import is_remote

    files: list[str] = []
    # Which stems the model has does not matter here, nor does the only one's name.
    read = DataConfig(sources=[SourceConfig(modality="vision")])
    read.read_from(data, [])
    for source in read.sources:
        try:
            found = shards_or_command(source).paths
        except (DataError, OSError) as error:
            return [], str(error)
        files += [path for path in found if not is_remote(path)]
    return files, ""


def device_problems(local_rank: int) -> list[str]:
    """A device that is missing or computes wrongly. On a machine without accelerators only the processor is tried."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        return ["no CUDA device (on a CPU cluster set DS_ACCELERATOR=cpu)"]
    elif local_rank >= torch.cuda.device_count():
        return [f"rank {local_rank} of this node has no device: there are {torch.cuda.device_count()}"]
    else:
        device = torch.device("cuda", local_rank)
    try:
        ones = torch.ones(256, 256, device=device)
        if float((ones @ ones).sum()) != 256.0**3:
            return [f"{device} computes wrongly"]
    except RuntimeError as error:
        return [f"{device} does not compute: {str(error).splitlines()[0]}"]
    return []


def summarise(findings: list[Findings | None], node_of_rank: list[str]) -> Report:
    """Problems by node: what its ranks found, ranks that did not come, versions that differ from the majority's."""
    bad: dict[str, list[str]] = {}
    present = [found for found in findings if found is not None]
    common = Counter(json.dumps(found.versions, sort_keys=True) for found in present).most_common(1)[0][0]
    newest_clock = max(found.clock for found in present)
    for rank, found in enumerate(findings):
        problems = bad.setdefault(node_of_rank[rank], [])
        if found is None:
            new = [f"rank {rank} did not report"]
        else:
            new = list(found.problems)
            new += [
                f"{package} {found.versions[package]} instead of {wanted}"
                for package, wanted in json.loads(common).items()
                if found.versions[package] != wanted
            ]
        problems += [problem for problem in new if problem not in problems]
    skew = newest_clock - min(found.clock for found in present)
    return Report(
        {node: problems for node, problems in bad.items() if problems},
        ranks=len(findings),
        nodes=len(set(node_of_rank)),
        clock_skew_s=round(skew, 3),
        versions=json.loads(common),
    )


def _clock_problems(findings: list[Findings | None]) -> None:
    """Adds a problem to each rank whose clock is far from the median. Ranks read their clocks at the same moment."""
    clocks = sorted(found.clock for found in findings if found is not None)
    median = clocks[len(clocks) // 2]
    for found in findings:
        if found is not None and abs(found.clock - median) > MAX_CLOCK_SKEW_S:
            found.problems.append(f"its clock is off by {found.clock - median:+.1f} s")


class Meeting:
    """The ranks' meeting point: a key-value store on rank 0's node."""

    def __init__(self, rank: int, world_size: int, wait_s: float, all_reduce_s: float) -> None:
        import torch.distributed as dist

        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        port = int(os.environ.get("MASTER_PORT", "29400"))
        # Whoever comes first waits for rank 0, which waits for whoever comes last.
        timeout = datetime.timedelta(seconds=4 * wait_s)
        self.rank, self.world_size, self.wait_s, self.all_reduce_s = rank, world_size, wait_s, all_reduce_s
        self.store = dist.TCPStore(address, port, world_size, rank == 0, timeout, wait_for_workers=False)

    def gather(self, findings: Findings) -> list[Findings | None]:
        """Everyone's findings, on rank 0; None for a rank that did not come in time. Others get an empty list.

        Collective: all ranks should call; those that do not are waited for `wait_s`.
        """
        self.store.set(f"here/{self.rank}", "1")
        if self.rank != 0:
            self.store.get("meet")
            findings.clock = time.time()
            self.store.set(f"findings/{self.rank}", json.dumps(asdict(findings)))
            return []
        end = time.monotonic() + self.wait_s
        here = self._keys("here", end)
        self.store.set("meet", "1")
        findings.clock = time.time()
        self.store.set("findings/0", json.dumps(asdict(findings)))
        reported = self._keys("findings", end + 2, of=here)
        return [
            Findings(**json.loads(self.store.get(f"findings/{rank}"))) if rank in reported else None
            for rank in range(self.world_size)
        ]

    def _keys(self, name: str, end: float, of: set[int] | None = None) -> set[int]:
        wanted = set(range(self.world_size)) if of is None else of
        seen: set[int] = set()
        while seen != wanted and time.monotonic() < end:
            seen |= {rank for rank in wanted - seen if self.store.check([f"{name}/{rank}"])}
            time.sleep(0.02)
        return seen

    def all_reduce(self, local_rank: int) -> tuple[str, float]:
        """(problem or "", bandwidth in GB/s and rank as NCCL's tests define it: 2 (n-1)/n * bytes / seconds).

        Collective: all ranks must call.
        """
        import torch
        import torch.distributed as dist

        gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=self.all_reduce_s),
        )
        try:
            numbers = torch.full(((64 if gpu else 4) * 2**18,), float(self.rank + 1), device=device)
            seconds = []
            for _ in range(3):
                summed = numbers.clone()
                began = time.perf_counter()
                dist.all_reduce(summed)
                right = float(summed[-1]) == self.world_size * (self.world_size + 1) / 2
                seconds.append(time.perf_counter() - began)
            moved = 2 * (self.world_size - 1) / self.world_size * numbers.numel() * 4
            return ("" if right else "an all-reduce gave a wrong sum"), moved / min(seconds) / 1e9
        finally:
            dist.destroy_process_group()


def _node_of_rank(world_size: int, nodes: str, mine: str) -> list[str]:
    """Node names by rank, from the list that the job's preamble passes in rank order, equally many ranks on each."""
    names = nodes.split() or [mine]
    per_node = max(1, world_size // len(names))
    return [names[min(rank // per_node, len(names) - 1)] for rank in range(world_size)]


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time above 0")
    return seconds


def _give_up_after(seconds: float, report_file: Path | None, report: Report) -> threading.Timer:
    def give_up() -> None:
        if report_file is not None:
            report.problem = f"the all-reduce over {report.ranks} ranks did not end within {seconds:.0f} s"
            _publish(report, report_file)
        os._exit(EXIT_REQUEUE)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    return timer


def _publish(report: Report, file: Path) -> None:
    rate = "" if report.allreduce_gb_per_s is None else f", all-reduce {report.allreduce_gb_per_s:.2f} GB/s and rank"
    print(f"{report.text} ({report.nodes} nodes, {report.ranks} ranks{rate}, {report.seconds:.1f} s)", flush=True)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(report) | {"exit_code": report.exit_code, "text": report.text}, indent=1))
    except OSError as error:
        print(f"preflight: report not written: {error}", file=sys.stderr)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True, help="directory the run will write to")
    parser.add_argument("--report", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--data", default="", help="shard pattern, as for train.py")
    parser.add_argument("--min_free_gb", type=float, default=20.0, help="free space wanted in run_dir, in GB")
    parser.add_argument("--wait_s", type=_seconds, help="how long to wait for a node, in seconds; grows with nodes")
    parser.add_argument("--all_reduce_s", type=_seconds, help="how long the all-reduces may take; grows with nodes")
    options = parser.parse_args()
    env: Any = os.environ
    rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))
    world_size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1")))
    local_rank = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")))
    node = env.get("SLURMD_NODENAME", socket.gethostname())

    node_of_rank = _node_of_rank(world_size, env.get("D2V_SCALE_NODES", ""), node)
    nodes = max(len(set(node_of_rank)), int(env.get("SLURM_NNODES", "1")))
    wait_s = options.wait_s or WAIT_S + WAIT_S_PER_NODE * nodes
    all_reduce_s = options.all_reduce_s or ALL_REDUCE_S + ALL_REDUCE_S_PER_NODE * nodes

    found = Findings(rank, node, versions())
    found.problems += filter(None, [open_files.problem(rank, world_size)])
    found.problems += disk_problems(options.run_dir, options.min_free_gb)
    if options.data and local_rank == 0:
        shards, problem = local_shards(options.data)
        found.problems += [problem] if problem else shard_problems(shards, rank, world_size)
    found.problems += device_problems(local_rank)

    meeting = Meeting(rank, world_size, wait_s, all_reduce_s)
    everyone = meeting.gather(found)
    if rank != 0:
        if meeting.store.get("go") == b"1":
            timer = _give_up_after(all_reduce_s, None, Report({}))
            meeting.all_reduce(local_rank)
            timer.cancel()
        return EXIT_DONE
    _clock_problems(everyone)
    report = summarise(everyone, node_of_rank)
    meeting.store.set("go", "0" if report.bad_nodes else "1")
    if not report.bad_nodes:
        timer = _give_up_after(all_reduce_s, options.report, report)
        report.problem, rate = meeting.all_reduce(local_rank)
        report.allreduce_gb_per_s = round(rate, 3)
        timer.cancel()
    report.seconds = round(time.monotonic() - began, 1)
    _publish(report, options.report)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
