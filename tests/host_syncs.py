"""What would make the host wait for a GPU, found on a CPU: every read of a tensor's value, and who asked for it."""

import traceback
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

# Call sites that may read, and why.
ALLOWED = {
    # DeepSpeed's verdict: whether a gradient is not finite decides on the host if there is a step. It asks once before
    # the optimizer's kernels are queued; what it asks again (ZeRO-1 and 2) is on the host's side of that wait.
    "is_invalid_grad_norm for zero.py:step",
    # Masks are drawn on the host, and their layout read there, before the batch is copied to the device.
    "of for batch.py:of",
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
        site = _site()
        if not self.ignoring and site not in ALLOWED:
            self.found[f"{what} in {site}"] += 1

    def __str__(self) -> str:
        return "".join(f"\n{count} times {site}" for site, count in self.found.items())


def _site() -> str:
    """The function that reads, and the innermost one of the package that it reads for."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    ours = [f for f in frames if Path(f.filename).is_relative_to(_ROOT / "d2v_scale")] or frames
    return f"{frames[-1].name} for {Path(ours[-1].filename).name}:{ours[-1].name}"


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
    """Record what this thread reads inside."""
    syncs = HostSyncs()

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            syncs.note(name)
            return original(self, *args, **kwargs)

        return call

    with patch.context() as inside, _Recorder(syncs):
        for name in _METHODS:
            inside.setattr(Tensor, name, noted(name, getattr(Tensor, name)))
        yield syncs
