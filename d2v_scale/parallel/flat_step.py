"""DeepSpeed's step at stages 1 and 2 on a CPU with less memory traffic: the same weights and moments, bit by bit.

DeepSpeed lays the gradients of a group side by side in fresh memory, scales them there, steps, and copies the masters
to the weights: more traffic than AdamW itself has. Here the fused kernel reads gradients where they lie, in pieces of
whole vectors of it; those in bf16 go through a buffer that stays in the cache. Where a rank reduces with nobody,
nothing is copied for it. Where DeepSpeed's source is not that of 0.19.8 its own code runs, and one warning says so.
"""

import hashlib
import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.parallel import gradient_norm

if TYPE_CHECKING:
    from d2v_scale.parallel.zero import StudentEngine

log = logging.getLogger("d2v_scale.train")

WRITTEN_FOR = "0.19.8"
"""The DeepSpeed whose code is replaced."""

_EXPECTED = {
    "step": "9520884fd916d178",
    "scaled_global_norm": "63c6a6fe100c4e49",
    "unscale_and_clip_grads": "6bf2ce6f97eafcc2",
    "_optimizer_step": "d7e21affbbf9b696",
    "buffered_reduce_fallback": "1cb18c2ee22958ed",
}
"""What is replaced, or is relied on by what replaces it -> the start of the SHA-256 of its source."""

_VECTOR = 16
"""Values of the kernel's unit: in pieces of multiples of it every value is computed as in the whole."""

_warned = False


def bind(student: "StudentEngine") -> None:
    """Step this way from now on, on a CPU at stage 1 or 2 without offload; on every device share the masters there.
    Local; once built, before the layout is checked."""
    zero = student.engine.optimizer
    if student.stage == 3 or zero.cpu_offload:
        return
    _share_masters(zero)
    if zero.device != "cpu" or not _is_plain(zero):
        return
    if differing := [name for name, digest in digests().items() if digest != _EXPECTED[name]]:
        _warn(differing)
        return
    zero.step = _FlatStep(student)
    if all(dist.get_world_size(group) == 1 for group in {zero.dp_process_group, *zero.real_dp_process_group}):
        # The sum over one rank, divided by one.
        zero.buffered_reduce_fallback = lambda *_, **__: None


def _share_masters(zero: Any) -> None:
    """Make every master that is fp32 as its weights are those weights, of which DeepSpeed keeps a copy that it copies
    back after every step. It copies what is in one place to itself then, which is nothing."""
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        own_n = zero.parallel_partitioned_bit16_groups[index][_rank(zero, index)]
        if (own_n.dtype, own_n.device) == (master.dtype, master.device):
            master.data = own_n.data
    # DeepSpeed's table of what of a master belongs to a weight holds views.
    zero._link_all_hp_params()


def _is_plain(zero: Any) -> bool:
    """Whether all that DeepSpeed's step does is to judge, clip and step, in this optimizer."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    return (
        type(zero) is DeepSpeedZeroOptimizer
        and isinstance(zero.timers, NoopTimer)
        and isinstance(zero.optimizer, torch.optim.AdamW)
        and all(group["fused"] and not group["amsgrad"] for group in zero.optimizer.param_groups)
        and all(master.dtype == torch.float32 for master in zero.single_partition_of_fp32_groups)
        and zero.compute_grad_norm
        and zero.loss_scale == 1
        and zero.torch_autocast_gradscaler is None
        and not (zero.has_moe_layers or zero.zenflow)
    )


def digests() -> dict[str, str]:
    """The start of the SHA-256 of each source that this relies on, as installed; "" where it is gone."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    found = {}
    for name in _EXPECTED:
        try:
            source = inspect.getsource(getattr(DeepSpeedZeroOptimizer, name, None))  # type: ignore[arg-type]
        except (TypeError, OSError):
            found[name] = ""
        else:
            found[name] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return found


def _warn(differing: list[str]) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    import deepspeed

    # All ranks say the same.
    say = log.warning if dist.get_rank() == 0 else log.debug
    say(
        "DeepSpeed %s has another %s than %s, for which its step on a CPU was replaced: its own code runs, and the "
        "optimizer's share of a step is several times as large.",
        deepspeed.__version__,
        " and ".join(differing),
        WRITTEN_FOR,
    )


class _FlatStep:
    """What is called in place of DeepSpeed's `step`."""

    def __init__(self, student: "StudentEngine") -> None:
        self._student = student
        self._zero: Any = student.engine.optimizer
        self._buffer = torch.empty(gradient_norm.CHUNK)

    @torch.no_grad()
    def __call__(self, closure: Any = None) -> None:
        """Judge, clip and step. Collective, as DeepSpeed's; `overflow` says whether nothing was changed."""
        from deepspeed.runtime.utils import all_gather_dp_groups, is_invalid_grad_norm

        assert closure is None, "the gradients are there"
        zero = self._zero
        zero.micro_step_id = -1
        zero.overflow = False
        if zero.check_grad_overflow and zero.model_parallel_world_size > 1:
            # The norm has what all ranks hold of the first one alone; in every other place it shows what is not finite.
            zero.check_overflow(partition_gradients=zero.partition_gradients)
        norm = None if zero.overflow else zero.scaled_global_norm()
        if norm is None or ((zero.dtype != torch.bfloat16 or zero.check_grad_overflow) and is_invalid_grad_norm(norm)):
            zero.overflow = True
            zero._global_grad_norm = float("inf")
            zero.zero_grad(set_to_none=True)
            for index in zero.averaged_gradients:
                zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
            return
        zero._global_grad_norm, factor = norm, _factor(zero, norm)
        for index in range(len(zero.bit16_groups)):
            self._step_group(index, norm, factor)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _step_group(self, index: int, norm: Tensor, factor: Tensor | None) -> None:
        zero = self._zero
        gradients = [gradient.reshape(-1) for gradient in zero.averaged_gradients[index]]
        zero.free_grad_in_param_list(zero.bit16_groups[index])
        zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        master, group = zero.single_partition_of_fp32_groups[index], zero.optimizer.param_groups[index]
        compute_n = zero.parallel_partitioned_bit16_groups[index][_rank(zero, index)].data
        assert sum(flat_n.numel() for flat_n in gradients) == master.numel(), "a gradient for every value"
        whole = self._student.whole_gradients or group.get("is_matrix", False)
        if whole:
            master.grad = torch.cat(gradients).to(torch.float32)
            zero.unscale_and_clip_grads([master.grad], norm)
        else:
            _begin(zero.optimizer.state[master], master.data)
        # Without a gradient beside its master the optimizer calls its hooks and steps nothing.
        zero._optimizer_step(index)
        master.grad = None
        if whole:
            compute_n.copy_(master.data)
        else:
            self._step_pieces(master, compute_n, gradients, factor, group)

    def _step_pieces(
        self, master: Tensor, compute_n: Tensor, gradients: list[Tensor], factor: Tensor | None, group: dict[str, Any]
    ) -> None:
        """AdamW of a flat master whose gradient lies in pieces, each times `factor`; then its weights follow."""
        state = self._zero.optimizer.state[master]
        state["step"] += 1
        stepped = (master.data, state["exp_avg"], state["exp_avg_sq"])
        shared = compute_n.data_ptr() == master.data_ptr()
        if shared and all(flat_n.dtype == torch.float32 for flat_n in gradients):
            pieces = _uncut(gradients, master.numel())
            if factor is not None:
                torch._foreach_mul_([flat_n for _, flat_n in pieces], factor)
            _fused(stepped, pieces, state["step"], group)
            return
        first = 0
        for parts in gradient_norm.chunks(gradients):
            gradient_n = gradient_norm.filled(self._buffer, parts)
            if factor is not None:
                gradient_n.mul_(factor)
            _fused(stepped, [(first, gradient_n)], state["step"], group)
            end = first + gradient_n.numel()
            if not shared:
                compute_n[first:end].copy_(master.data[first:end])
            first = end


Piece = tuple[int, Tensor]
"""Where a flat gradient belongs in its master, and the gradient."""


def _uncut(gradients: list[Tensor], size: int) -> list[Piece]:
    """A flat gradient of this size in pieces of whole vectors: the few values around an end that cuts one are copied
    together, the others stay where they lie."""
    found: list[Piece] = []
    across: list[Tensor] = []
    first, missing = 0, 0
    for flat_n in gradients:
        if missing:
            head_n, flat_n = flat_n[:missing], flat_n[missing:]
            across.append(head_n)
            missing -= head_n.numel()
            if missing:
                continue
            found.append((first, torch.cat(across)))
            first, across = first + _VECTOR, []
        left = flat_n.numel()
        whole = left if first + left == size else left // _VECTOR * _VECTOR
        if whole:
            found.append((first, flat_n[:whole]))
        if whole < left:
            across, missing = [flat_n[whole:]], _VECTOR - (left - whole)
        first += whole
    if across:
        found.append((first, torch.cat(across)))
    return found


def _begin(state: dict[str, Any], master_n: Tensor) -> None:
    """Moments as torch's fused AdamW begins with, where there are none yet."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master_n), torch.zeros_like(master_n)


def _fused(stepped: Sequence[Tensor], pieces: list[Piece], step: Tensor, group: dict[str, Any]) -> None:
    """torch's fused AdamW of pieces of flat weights and moments (`stepped`), whose `step` has been counted."""
    places = [slice(first, first + flat_n.numel()) for first, flat_n in pieces]
    weights, averages, squares = ([whole_n[place] for place in places] for whole_n in stepped)
    torch._fused_adamw_(
        weights,
        [flat_n for _, flat_n in pieces],
        averages,
        squares,
        [],
        [step] * len(pieces),
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _factor(zero: Any, norm: Tensor) -> Tensor | None:
    """What gradients are multiplied by, as DeepSpeed's `unscale_and_clip_grads` has it; None: by one."""
    if zero.clip_grad == 0:
        return None
    factor = 1.0 / torch.clamp((norm + 1e-6) / zero.clip_grad, min=1.0)
    return None if factor == 1 else factor


def _rank(zero: Any, index: int) -> int:
    """Of this process among those that share a group of parameters."""
    rank: int = dist.get_rank(zero.real_dp_process_group[index])
    return rank
