"""Variables that libraries read once, when they start: what a rank wants where its user has not said otherwise.

Torch-free, so that `train.py` calls it before torch is imported. What is set stays set: `NAME=value` in the shell or in
slurm/site.env wins always.

| variable | value | why |
|---|---|---|
| `OMP_NUM_THREADS` | cores / ranks of the node; 1 without a GPU | each rank would take all cores |
| `PYTORCH_ALLOC_CONF` | `expandable_segments:True` | batches of many lengths leave holes in fixed segments |
| `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE` | `1` | products of what stays in fp32 run on tensor cores; `0` for exact fp32 |
| `CUDA_DEVICE_MAX_CONNECTIONS` | `1` with tensor parallelism, else `8` | below |

With one hardware queue kernels run in the order they are launched: megatron-core relies on it to send an all-reduce
before the product that hides it. ZeRO's gathers and reductions run beside products only where they have other queues;
8 is CUDA's own number, written down because a leftover 1 is what they would suffer from.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg")


def may_have_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether PyTorch may find a GPU, and is to be asked: of NVIDIA or, under the same name, of AMD."""
    found = any(Path(name).exists() for name in (*_DEVICE_FILES, "/dev/kfd"))
    return found and environment.get("DS_ACCELERATOR") != "cpu"


def prepare(environment: MutableMapping[str, str] = os.environ, *, has_gpu: bool | None = None) -> None:
    """Set what is not set. Before torch is imported, or at least before a GPU is used. `has_gpu`: None looks for one.

    `OMP_NUM_THREADS` is left alone where it is not known how many ranks share the node: PyTorch's own number is right
    for one.
    """
    if has_gpu is None:
        has_gpu = environment.get("DS_ACCELERATOR") != "cpu" and any(Path(name).exists() for name in _DEVICE_FILES)
    if not has_gpu:
        return
    # The second is the older name, still read.
    if "PYTORCH_ALLOC_CONF" not in environment and "PYTORCH_CUDA_ALLOC_CONF" not in environment:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    environment.setdefault("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    threads = threads_of_a_rank(environment)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))


def threads_of_a_rank(environment: Mapping[str, str], cores: int | None = None) -> int | None:
    """Cores of this node for each of its ranks; None for a single one, or where nobody says how many there are.

    `cores`: those that this process may run on; None asks the system. Slurm binds a task to its own where the job asks
    for a number of cores a task: then they are not divided again.
    """
    ranks = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    if ranks is None or int(ranks) < 2:
        return None
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    own = environment.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_PROCID" in environment and own.isdigit() and cores <= int(own):
        return max(1, cores)
    return max(1, cores // int(ranks))


def order_kernels(tensor_parallel: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set CUDA's hardware queues for this tensor-parallel size, unless they are. Before a GPU is used."""
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1" if tensor_parallel > 1 else "8")
