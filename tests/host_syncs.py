"""What would make the host wait for a GPU, found on a CPU: every read of a tensor's value, and who asked for it."""

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parents[1]
_HELPERS = (__file__, warnings.__file__)

# `item`, `bool`, `float`, `int`, `if tensor` all end in the first; the sizes of the others' results are values.
_READERS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten.bincount,
}
# On a CPU these read memory without calling an operator. `numpy` is `cpu().numpy()` on a device.
_METHODS = ("tolist", "cpu", "numpy", "__array__")

# Functions that may wait, by file and name, and why.
ALLOWED = {
    # Masks are drawn on the host, and their layout read there, before the batch is copied to the device.
    "batch.py:of",
    # DeepSpeed's verdict: whether a gradient is not finite decides on the host if there is a step. It asks several
    # times in a row, before the optimizer's kernels are queued.
    "utils.py:is_invalid_grad_norm",
    "utils.py:mask_nan_or_inf_with_val_inplace",
    "stage_1_and_2.py:has_overflow",
    "stage3.py:get_grad_norm_direct",
    # Runs on a CPU alone, where the verdict has just been read.
    "flat_step.py:_factor",
    # ZeRO-3, on a device only: after each backward pass for the reduced gradients; in a world of one for every fetched
    # parameter; for what is gathered for good after a step.
    "stage3.py:independent_gradient_partition_epilogue",
    "partition_parameters.py:wait",
    "partition_parameters.py:_allgather_params_coalesced",
    "partition_parameters.py:_allgather_params_sequential",
}


@dataclass
class HostSyncs:
    """Reads since the recording began."""

    ignoring: bool = True
    """Whether waiting is right now: outside the loop, and at logged steps."""
    found: Counter[str] = field(default_factory=Counter)
    """How often, by what was called and where."""

    def note(self, what: str) -> None:
        """Count one read of the code that runs now."""
        asked, asking = _site()
        if not self.ignoring and asked not in ALLOWED:
            self.found[f"{what} in {asked} for {asking}"] += 1

    def __str__(self) -> str:
        return "".join(f"\n{count} times {site}" for site, count in self.found.items())


def _site() -> tuple[str, str]:
    """The function that waits, and the innermost one of the package that it waits for."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename not in _HELPERS]
    ours = [f for f in frames if Path(f.filename).is_relative_to(_ROOT / "d2v_scale")] or frames
    asked, asking = (f"{Path(f.filename).name}:{f.name}" for f in (frames[-1], ours[-1]))
    return asked, asking


class _Recorder(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        packet = func.overloadpacket
        by_mask = packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = func is torch.ops.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if packet in _READERS or by_mask or counted:
            self._syncs.note(packet.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[HostSyncs]:
    """Record what this thread reads inside, and where DeepSpeed waits for the device."""
    from deepspeed.accelerator import get_accelerator

    syncs = HostSyncs()
    with patch.context() as inside, _Recorder(syncs):
        for name in _METHODS:
            inside.setattr(Tensor, name, _noted(syncs, name, getattr(Tensor, name)))
        accelerator = get_accelerator()
        inside.setattr(accelerator, "synchronize", _noted(syncs, "synchronize", accelerator.synchronize))
        yield syncs


@contextmanager
def recorded_by_the_device(patch: pytest.MonkeyPatch) -> Iterator[HostSyncs]:
    """Record where any thread waits for a GPU inside: what PyTorch warns of, and `torch.cuda.synchronize`."""
    syncs = HostSyncs()

    def shown(message: Warning | str, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            syncs.note("wait")

    with patch.context() as inside, warnings.catch_warnings():
        warnings.simplefilter("always")
        inside.setattr(warnings, "showwarning", shown)
        inside.setattr(torch.cuda, "synchronize", _noted(syncs, "synchronize", torch.cuda.synchronize))
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield syncs
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def _noted(syncs: HostSyncs, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        syncs.note(name)
        return original(*args, **kwargs)

    return call
