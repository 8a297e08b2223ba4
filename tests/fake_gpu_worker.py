"""Forward passes, loss and everything observed of a step on tensors that pretend to be on a GPU, on any machine.

`fake_gpu_worker.py GUARD.so OUT.json MODEL ...`: fake tensors have a device and a shape, and no values. So an operation
of two devices raises, and so does one whose result's shape or Python value hangs on the values: on a GPU the host would
wait there. What is counted: kernels (operations that are no views) and copies between host and device, by phase.
"""

import collections
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

GPU = torch.device("cuda", 0)
_MAKES_NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view")


class Counted(TorchDispatchMode):
    """Counts kernels and copies by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "made"
        self.kernels: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions about a tensor
            return out
        tensors = [x for x in tree_flatten((args, kwargs or {}, out))[0] if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or "copy" in str(func)}
        if {"cpu", "cuda"} <= devices:
            self.copies[self.phase] += 1
        elif "cuda" in devices and not func.is_view and func.overloadpacket.__name__ not in _MAKES_NOTHING:
            self.kernels[self.phase] += 1
        return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: object
) -> Tensor:
    """The memory-efficient kernel, which a build without CUDA cannot choose. A mask as it wants it is made as PyTorch
    makes it."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
        if attn_mask.shape[-1] % 8:
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % 8))[..., : attn_mask.shape[-1]]
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    log_sums = torch.is_grad_enabled() and q.requires_grad
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, log_sums, dropout_p, False)[0]


class Forward:
    """Stands where the student's engine does: its forward passes, without the backward pass and the step."""

    def __init__(self, student: Any, teacher: Any, topology: Any, counted: Counted) -> None:
        self.module, self.topology, self._teacher, self._counted = student, topology, teacher, counted

    def add_loss_in(self, loss: Any) -> None:
        """No spikes are looked for."""

    def train_batches(self, batches: list[Any], draw: Any, objective: Any, *, measure: bool) -> Any:
        from d2v_scale.parallel.zero import StepResult

        for batch in batches:
            with self._counted.within("student"):
                output = self.module(batch, draw)
            objective.entered(batch, output.features_btd)
            with self._counted.within("teacher"):
                made = self._teacher.make(batch, output.features_btd)
            objective.share(batch, output.predictions, output.cls, made)
        return StepResult(applied=False, norm=0.0)


def pretended(batch: Any, mode: FakeTensorMode) -> Any:
    """The batch without values, copied to the GPU as the loop does."""
    layout = {name: mode.from_tensor(x) for name, x in batch.layout.tensors.items()}
    fields = {
        f.name: mode.from_tensor(x)
        for f in dataclasses.fields(batch)
        if isinstance(x := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **fields, layout=dataclasses.replace(batch.layout, **layout)).to(GPU)


def faulty(name: str) -> dict[str, Any]:
    """What must be found: an operation of two devices, and a wait for a value."""
    with FakeTensorMode(), GPU:
        here = torch.ones(3)
        return {"mixed": lambda: here + torch.ones(3, device="cpu"), "waits": lambda: {"shape": here.nonzero().shape}}[
            name
        ]()


def look(name: str, padded: bool) -> dict[str, dict[str, int]]:
    """A logged step of a tiny model in bf16: kernels and copies by phase."""
    import tiny_models

    from d2v_scale.data2vec.config import LossConfig, MaskingConfig, ObjectiveConfig
    from d2v_scale.networks.draw import Draw
    from d2v_scale.networks.stack import Student, Teacher
    from d2v_scale.parallel import groups
    from d2v_scale.pretraining.breakdown import LossBreakdown
    from d2v_scale.pretraining.step import collapse_statistics, train_step
    from d2v_scale.recipe import Recipe

    clones = 2 if name.startswith("v2") else 1
    objective = ObjectiveConfig(
        masking=MaskingConfig(clones=clones),
        target=tiny_models.target_of(name),
        loss=LossConfig(cls_weight=1.0 if name == "v2_vision" else 0.0),
    )
    recipe = Recipe(model=tiny_models.model(name), objective=objective)
    topology = dataclasses.replace(groups.single_process(), device=GPU)
    drawn = tiny_models.batch(name, 4, clones, padded=padded)
    batch = dataclasses.replace(drawn, source="here", keys=tuple("abcd"))
    counted = Counted()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, counted:
        torch.set_default_dtype(torch.bfloat16)
        with GPU:
            student = Student(recipe.model, target_widths=recipe.target_widths())
            teacher = Teacher(recipe.model, recipe.targets(), recipe.parts())
        torch.set_default_dtype(torch.float32)
        student.train()
        counted.phase = "batch"
        moved = [pretended(batch, mode) for _ in range(2)]
        counted.phase = "loss"
        breakdown = LossBreakdown(["here"], GPU)
        engine = Forward(student, teacher, topology, counted)
        holder = type("Holder", (), {"module": teacher})()
        _, seen = train_step(engine, holder, moved, objective, Draw(1, 1), observe=True, breakdown=breakdown)
        counted.phase = "statistics"
        collapse_statistics(seen, topology)
    phases = ("student", "teacher", "loss", "statistics")
    return {"kernels": {p: counted.kernels[p] for p in phases}, "copies": {p: counted.copies[p] for p in phases}}


def main() -> None:
    ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name in sys.argv[3:]:
        model, _, padded = name.partition("/")
        try:
            found[name] = look(model, bool(padded)) if "_" in model else faulty(model)
        except Exception as error:  # all models are looked at, whatever is wrong with one
            found[name] = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # what pretends to be on a GPU has nothing to be freed there


if __name__ == "__main__":
    main()
