"""What a rank's libraries are told, where its user has not told them already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.parallel import rank_environment

ROOT = Path(__file__).parents[2]


def prepared(**given: str) -> dict[str, str]:
    environment = dict(given)
    rank_environment.prepare(environment, has_gpu=True)
    return {name: value for name, value in environment.items() if given.get(name) != value}


def test_what_is_not_set_is_set_and_what_is_set_stays() -> None:
    cores = len(os.sched_getaffinity(0))
    assert prepared(LOCAL_WORLD_SIZE="2") == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
        "OMP_NUM_THREADS": str(max(1, cores // 2)),
    }
    own = {"PYTORCH_ALLOC_CONF": "x", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "OMP_NUM_THREADS": "7"}
    assert prepared(LOCAL_WORLD_SIZE="2", **own) == {}
    # The older name says the same.
    assert "PYTORCH_ALLOC_CONF" not in prepared(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")
    # One rank, or nobody knows how many: PyTorch's own number of threads.
    assert "OMP_NUM_THREADS" not in prepared()
    assert "OMP_NUM_THREADS" not in prepared(LOCAL_WORLD_SIZE="1")


def test_nothing_is_set_without_a_gpu() -> None:
    """On a CPU the second would change fp32 products, too."""
    environment = {"LOCAL_WORLD_SIZE": "2"}
    rank_environment.prepare(environment, has_gpu=False)
    assert environment == {"LOCAL_WORLD_SIZE": "2"}
    forced = {"DS_ACCELERATOR": "cpu"}
    rank_environment.prepare(forced)
    assert forced == {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    ("variables", "cores", "threads"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 96, 12),
        ({"LOCAL_SIZE": "8"}, 96, 12),  # DeepSpeed's launcher
        ({"LOCAL_WORLD_SIZE": "8"}, 4, 1),
        # srun has bound the task to its 12 cores; with 96 of them nothing is bound.
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "12"}, 12, 12),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "12"}, 96, 12),
        ({}, 96, None),
    ],
)
def test_ranks_of_a_node_share_its_cores(variables: dict[str, str], cores: int, threads: int | None) -> None:
    assert rank_environment.threads_of_a_rank(variables, cores) == threads


@pytest.mark.parametrize(("tensor", "queues"), [(1, "8"), (2, "1")])
def test_tensor_parallelism_keeps_kernels_in_order(tensor: int, queues: str) -> None:
    environment: dict[str, str] = {}
    rank_environment.order_kernels(tensor, environment)
    assert environment == {"CUDA_DEVICE_MAX_CONNECTIONS": queues}
    given = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    rank_environment.order_kernels(tensor, given)
    assert given == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}


def test_the_program_sets_it_before_torch_is_imported(tmp_path: Path) -> None:
    """OpenMP and cuBLAS read their variables when torch is loaded."""
    (tmp_path / "torch.py").write_text(
        "import os\n"
        "print({n: os.environ.get(n) for n in ('TORCH_ALLOW_TF32_CUBLAS_OVERRIDE', 'OMP_NUM_THREADS')})\n"
        "os._exit(0)\n"
    )
    # As on a node with a GPU: whatever stands for its device file is there.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from d2v_scale.parallel import rank_environment\n"
        "rank_environment._DEVICE_FILES = ('/',)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")
    }
    environment |= {"PYTHONPATH": str(tmp_path), "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "d2v_scale/train.py")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "'TORCH_ALLOW_TF32_CUBLAS_OVERRIDE': '1'" in done.stdout, done.stderr
    assert f"'OMP_NUM_THREADS': '{max(1, len(os.sched_getaffinity(0)) // 2)}'" in done.stdout


def test_what_the_documentation_says_is_what_is_set() -> None:
    table = rank_environment.__doc__ or ""
    for name, value in prepared(LOCAL_WORLD_SIZE="2").items():
        assert f"`{name}`" in table
        assert value in table or name == "OMP_NUM_THREADS"
        assert name in (ROOT / "slurm/README.md").read_text()
