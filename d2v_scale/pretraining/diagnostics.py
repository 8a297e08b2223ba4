"""Gradient and update of every part of the student, at the steps that are logged, whatever ZeRO stage holds them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.parallel.shards import Shard
from d2v_scale.parallel.zero import StudentEngine

PARTS = ("stem", "blocks_first", "blocks_middle", "blocks_last", "predictor")
SAMPLE = 4096
"""Elements of one shard, evenly spaced, that are kept to see how far the optimizer moved it."""


def part_of(name: str, depth: int) -> str:
    """The part of the student that a parameter belongs to; the main blocks make three thirds."""
    root, _, rest = name.partition(".")
    if root == "blocks":
        return PARTS[1 + min(2, int(rest.partition(".")[0]) * 3 // max(1, depth))]
    return {"predictors": "predictor", "predictor": "predictor", "final_norm": "blocks_last"}.get(root, "stem")


class StepDiagnostics:
    """Gradient norm and update-to-weight ratio per part of one step: `arm` before it, `figures` after it.

    The gradients are read where every ZeRO stage has them in one form: beside the flat fp32 masters, as the torch
    optimizer is about to step (DeepSpeed frees them right after). The ratio compares up to SAMPLE elements of each
    shard before and after, so tensors above that size are estimated. No host synchronisation.
    """

    def __init__(self, student: StudentEngine, depth: int) -> None:
        """`depth`: of the main blocks."""
        self._student = student
        self._depth = depth
        self._shards = [shard for shard in student.shards() if shard.slice is not None or _first(student)]
        self._parts = [PARTS.index(part_of(shard.name, depth)) for shard in self._shards]
        self._before: list[Tensor] = []
        self._squares: dict[int, Tensor] = {}
        self._armed = False
        student.optimizer.register_step_pre_hook(self._read_gradients)

    def arm(self) -> None:
        """Watch the step that follows. Local."""
        self._armed = self._student.whole_gradients = True
        self._squares = {}
        self._before = [_sample(shard).clone() for shard in self._shards]

    @torch.no_grad()
    def figures(self, grad_norm: float) -> dict[str, Tensor]:
        """`grad_norm/<part>` before clipping and `update_ratio/<part>`, as 0-dim tensors; parts without are left out.

        `grad_norm`: the global one, of an applied step. Collective: all ranks must call.
        """
        self._armed = self._student.whole_gradients = False
        device = self._student.topology.device
        sums = torch.zeros(3, len(PARTS), dtype=torch.float32, device=device)
        for index, (shard, part) in enumerate(zip(self._shards, self._parts, strict=True)):
            if index in self._squares:
                sums[0, part] += self._squares[index].to(device, non_blocking=True)
            after, before = _sample(shard), self._before[index]
            scale = shard.numel / before.numel()
            pair = torch.stack(((after - before).square().sum(), before.square().sum())) * scale
            sums[1:, part] += pair.to(device, non_blocking=True)
        self._before, self._squares = [], {}
        if dist.is_initialized():
            dist.all_reduce(sums)
        # The optimizer saw clipped gradients; their shares of the global norm are those before clipping.
        norms = grad_norm * (sums[0] / sums[0].sum().clamp_min(1e-30)).sqrt()
        ratios = (sums[1] / sums[2].clamp_min(1e-30)).sqrt()
        present = [PARTS.index(part) for part in self._present()]
        values = {f"grad_norm/{PARTS[i]}": norms[i] for i in present}
        return values | {f"update_ratio/{PARTS[i]}": ratios[i] for i in present}

    def _present(self) -> list[str]:
        names = (name for name, _ in self._student.module.named_parameters())
        found = {part_of(name, self._depth) for name in names}
        return [part for part in PARTS if part in found]

    @torch.no_grad()
    def _read_gradients(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """DeepSpeed steps one group (stage 3: one sub-group) at a time, so this runs several times a step."""
        if not self._armed:
            return
        # Compared by identity: a dictionary of tensors would compare their values.
        stepping = {id(p): p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for index, shard in enumerate(self._shards):
            gradient = stepping.get(id(shard.master))
            if gradient is not None:
                own = gradient.view(-1).narrow(0, shard.offset, shard.numel)
                self._squares[index] = torch.linalg.vector_norm(own, dtype=torch.float32).square()


def _first(student: StudentEngine) -> bool:
    """Whether this rank counts for values that all tensor-parallel ranks hold."""
    return student.topology.tensor_rank == 0


def _sample(shard: Shard) -> Tensor:
    return shard.weight[:: -(-shard.numel // SAMPLE)]
