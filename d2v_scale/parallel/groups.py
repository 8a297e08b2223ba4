"""Process groups: who holds which part of the model and of the batch.

DeepSpeed and megatron-core must see the same groups. megatron-core's `parallel_state` makes them (order: tensor, then
data, then pipeline); DeepSpeed reads them through `ModelParallelUnit`.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.errors import UserError
from d2v_scale.parallel import launchers, open_files, rank_environment, timeouts
from d2v_scale.parallel.config import ParallelConfig, data_parallel_size

STALE_LOCK_SECONDS = 600
NOTICE_SECONDS = 30.0
"""After which a rank says that it still waits for the others."""

log = logging.getLogger(__name__)


class ModelParallelUnit:
    """DeepSpeed's `mpu` protocol over megatron-core's groups."""

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_rank(self) -> int:
        """Rank in the group that shares one copy of the model (tensor and pipeline together)."""
        return dist.get_rank(group=self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the group that shares one copy of the model (tensor and pipeline together)."""
        return dist.get_world_size(group=self.get_model_parallel_group())


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This process's place in the world."""

    rank: int
    world_size: int
    local_rank: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    device: torch.device
    mpu: ModelParallelUnit

    def tags(self) -> dict[str, int]:
        """How the processes share the work, for the record."""
        return {
            "world_size": self.world_size,
            "data_parallel": self.data_parallel_size,
            "tensor_parallel": self.tensor_size,
            "pipeline_parallel": self.pipeline_size,
        }

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same slice of the model and split the batch."""
        return self.mpu.get_data_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The ranks that share the list of layers, first stage first."""
        return self.mpu.get_pipeline_model_parallel_group()

    @property
    def stage_group(self) -> dist.ProcessGroup:
        """The ranks that hold parts of the same layers: all but those of other pipeline stages."""
        return self.mpu.get_tensor_and_data_parallel_group()

    @property
    def model_group(self) -> dist.ProcessGroup:
        """The ranks that together hold one copy of the model; they work on the same micro-batches."""
        return self.mpu.get_model_parallel_group()

    @property
    def model_size(self) -> int:
        """How many ranks hold one copy of the model together."""
        return self.tensor_size * self.pipeline_size

    def sum_over_replicas(self, x: Tensor) -> None:
        """Add what the data-parallel ranks counted, in place. Collective over them."""
        if self.data_parallel_size > 1:
            dist.all_reduce(x, group=self.data_parallel_group)

    def sum_over_model(self, x: Tensor) -> None:
        """Add what data-parallel ranks and pipeline stages counted, in place; a stage that has not seen a thing has
        zeros for it. Collective over both groups."""
        self.sum_over_replicas(x)
        if self.pipeline_size > 1:
            dist.all_reduce(x, group=self.pipeline_group)


def model_group_on_host(topology: Topology) -> dist.ProcessGroup:
    """The ranks of `topology.model_group` over host memory: a gloo group of their own beside NCCL's, else that group.

    NCCL sends Python objects through the device, for which the host waits. Collective: all ranks must call.
    """
    if dist.get_backend(topology.model_group) != "nccl":
        return topology.model_group
    tensor, data = topology.tensor_size, topology.data_parallel_size
    replicas = [
        [own + tensor * (replica + data * stage) for stage in range(topology.pipeline_size) for own in range(tensor)]
        for replica in range(data)
    ]
    group, _ = dist.new_subgroups_by_enumeration(replicas, backend="gloo")
    assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(topology.model_group)
    return group


def initialize(config: ParallelConfig | None = None, timeout_minutes: float = 30.0) -> Topology:
    """Form the process groups from the launcher's environment (`launchers.adopt`). Collective: all ranks, once.

    Without a launcher (RANK unset) this is `single_process`. `timeout_minutes`: after which a rank gives up on another,
    in this and in every later group. Raises ConfigError before any group is formed when the world cannot be divided as
    `config` says, and UserError when the port to meet at is taken or this process may not open a socket to every peer.
    """
    config = config or ParallelConfig()
    world_size = launchers.world_size()
    data_parallel_size(config, world_size)
    timeouts.limit_all(timedelta(minutes=timeout_minutes))
    if "RANK" not in os.environ:
        return single_process()
    problem = open_files.problem(int(os.environ["RANK"]), world_size)
    if problem:
        raise UserError(
            f"{problem} on {socket.gethostname()}", "Raise it (limits.conf, LimitNOFILE) or start fewer ranks."
        )
    rank_environment.order_kernels(config.tensor)
    prepare_accelerator()
    import deepspeed

    device = _select_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        with _meeting_the_others():
            deepspeed.init_distributed(timeout=timeouts.current(), verbose=False)
    return _divide(config, device)


@contextlib.contextmanager
def _meeting_the_others() -> Iterator[None]:
    """Says who is waited for where, if it takes long. Raises UserError for a port that another program has."""
    world_size, port = launchers.world_size(), os.environ.get("MASTER_PORT")
    where = f"{os.environ.get('MASTER_ADDR')}:{port}"
    notice = threading.Timer(
        NOTICE_SECONDS,
        log.warning,
        (
            "Rank %s still waits at %s for the other %d processes that WORLD_SIZE announces. If there are none, "
            "`unset RANK WORLD_SIZE` and start again.",
            os.environ.get("RANK"),
            where,
            world_size - 1,
        ),
    )
    notice.daemon = True
    if world_size > 1:
        notice.start()
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"Port {port} of this node, where the ranks were to meet, is taken by another program or training",
            "Give a free one: --master_port of deepspeed and torchrun, or MASTER_PORT.",
        ) from error
    finally:
        notice.cancel()


def single_process() -> Topology:
    """A world of one, without launcher or ports, on the GPU of LOCAL_RANK where that is set. For tools and tests."""
    prepare_accelerator()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = _select_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise RuntimeError("single_process() was called in a world of several processes")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engine insists on it.
    return _divide(ParallelConfig(), device)


def shutdown() -> None:
    """Take the groups down. Collective where there is more than one rank.

    Without this, gloo workers abort at exit now and then.
    """
    if not dist.is_initialized():
        return
    from deepspeed import comm
    from megatron.core import parallel_state

    if dist.get_world_size() > 1:
        dist.barrier()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # DeepSpeed keeps its own handle, and would believe itself initialized in a second world of the same process.
    comm.comm.cdb = None


def _divide(config: ParallelConfig, device: torch.device) -> Topology:
    from megatron.core import parallel_state

    data_parallel_size(config, dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeouts.current().total_seconds() / 60,
        )
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=launchers.number_on_node(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        device=device,
        mpu=ModelParallelUnit(),
    )


def _select_device(local_rank: int) -> torch.device:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return torch.device("cpu")
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(), local_rank)


def prepare_accelerator() -> None:
    """One thread a rank on a CPU, on a GPU node its share of the cores, unless the user says otherwise; on a CPU no
    operator is compiled at start."""
    on_cpu = os.environ.get("DS_ACCELERATOR", "" if torch.cuda.is_available() else "cpu") == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
    elif "OMP_NUM_THREADS" not in os.environ and (threads := rank_environment.threads_of_a_rank(os.environ)):
        # Only now the launcher's variables are known under torch's names.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    with _without("mlflow"):
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(os.environ.get("D2V_DEEPSPEED_LOG", "WARNING"))
    if on_cpu:
        # ZeRO never uses the shared-memory operator, but DeepSpeed would compile it for half a minute.
        with contextlib.suppress(AttributeError):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _clear_stale_locks()


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Importing `module` fails inside, unless it is there already.

    DeepSpeed's autotuner, which nothing here uses, imports MLflow where it can: seconds of every start.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _clear_stale_locks() -> None:
    """An operator build that was killed leaves a lock that makes every later run wait for ever."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder is None:
        return
    for lock in Path(folder).glob("*/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
                lock.unlink()
