"""What a node's processors, memory and devices do while it trains, sampled in the background."""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from d2v_scale.files import append_line
from d2v_scale.tracking.record import parse_lines

_MIB = 1024**2


def system_files(run_dir: Path) -> list[Path]:
    """The files of all nodes' monitors."""
    return sorted((run_dir / "logs").glob("system-*.jsonl"))


def node_of(path: Path) -> str:
    """The node a monitor's file is of."""
    return path.stem.removeprefix("system-")


class SystemMonitor:
    """Samples one node into logs/system-<node>.jsonl; start one in a single process of every node.

    `step` counts samples, as MLflow's own system metrics do, and goes on where an earlier attempt on the node ended.
    A thread that sleeps: it never touches the training step, and a sample that fails is left out.
    """

    def __init__(self, run_dir: Path, every: float = 60.0) -> None:
        """`every`: seconds between samples."""
        node = os.environ.get("SLURMD_NODENAME") or platform.node() or "node"
        self._path = run_dir / "logs" / f"system-{node}.jsonl"
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system monitor", daemon=True)
        self._network: tuple[float, int, int] | None = None

    def start(self) -> None:
        """Begin sampling."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling; waits for a sample that is being taken."""
        self._stop.set()
        self._thread.join(timeout=10)

    def __enter__(self) -> "SystemMonitor":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _run(self) -> None:
        count = 0
        if self._path.exists():
            count = max((record["step"] for _, _, record in parse_lines(self._path.read_bytes())), default=0)
        while not self._stop.wait(self._every):
            try:
                append_line(self._path, {"step": count + 1, "time": time.time(), **self.sample()})
                count += 1
            except Exception:  # a full disk or a driver's refusal is no reason to disturb the run
                continue

    def sample(self) -> dict[str, float]:
        """Use of processors, memory, network and devices of this node now, in the units of the names."""
        import psutil  # type: ignore[import-untyped]

        memory = psutil.virtual_memory()
        network = psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(interval=None),
            "system_memory_usage_megabytes": memory.used / _MIB,
            "system_memory_usage_percentage": memory.percent,
        }
        now = (time.monotonic(), network.bytes_recv, network.bytes_sent)
        if self._network is not None:
            seconds = max(now[0] - self._network[0], 1e-9)
            values["network_receive_megabytes_per_second"] = (now[1] - self._network[1]) / seconds / _MIB
            values["network_transmit_megabytes_per_second"] = (now[2] - self._network[2]) / seconds / _MIB
        self._network = now
        return values | _devices()


def _devices() -> dict[str, float]:
    """Memory, utilisation and power of every visible device, as far as its driver tells.

    All from the driver's library: PyTorch's own `mem_get_info` would take memory on every device for this process.
    """
    import torch

    values: dict[str, float] = {}
    if not torch.cuda.is_initialized():  # asking would start the driver in a process that does not use it
        return values
    readers: dict[str, Callable[[int], float]] = {
        "memory_usage_megabytes": lambda index: torch.cuda.device_memory_used(index) / _MIB,
        "memory_usage_percentage": lambda index: (
            100 * torch.cuda.device_memory_used(index) / torch.cuda.get_device_properties(index).total_memory
        ),
        "utilization_percentage": torch.cuda.utilization,
        "power_usage_milliwatts": torch.cuda.power_draw,
    }
    for index in range(torch.cuda.device_count()):
        for name, read in readers.items():
            with contextlib.suppress(Exception):  # drivers refuse with errors of their own, each reading for itself
                values[f"gpu_{index}_{name}"] = float(read(index))
    return values
