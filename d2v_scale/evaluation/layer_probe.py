"""What the layers do with a batch that never changes: how widely the student attends, how alike both networks see.

Read by hooks that are there for one forward pass of both networks; each rank looks at the layers it runs, at every ZeRO
stage and in a pipeline.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2v_scale.batch import Batch
from d2v_scale.data2vec.statistics import linear_cka
from d2v_scale.model.block import Block
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.groups import Topology

ROWS = 16
"""Samples looked at."""
QUERIES = 64
"""Positions of a row whose attention is measured, evenly spaced."""
POSITIONS = 2048
"""Positions over all rows that the two networks are compared at."""


class LayerProbe:
    """Attention entropy of the student's main blocks, and their similarity (CKA) to the teacher's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, topology: Topology) -> None:
        """`student` and `teacher`: a `Student` and a `Teacher`, or the sections of them that are here."""
        self._student, self._teacher = cast(Student, student), cast(Teacher, teacher)
        self._topology = topology
        self._biases: dict[int, Tensor | None] = {}
        self._entropy: dict[int, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._cka: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, batch: Batch | None) -> Iterator[None]:
        """Look at the first forward pass of both networks inside, which must be of `batch`; None: at nothing. Local."""
        self._biases, self._entropy, self._states, self._cka = {}, {}, {}, {}
        handles = [] if batch is None else self._hooks(batch)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._biases, self._states = {}, {}

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """`attention_entropy/layer_<n>`: mean over heads and queries, in parts of the entropy of attending to all keys
        alike; `cka/layer_<n>`: linear CKA of student (masked) and teacher (unmasked) at the positions both have, of the
        layers that both have. Layers count from 1, with a mean over them under `attention_entropy` and `cka`.
        Collective: all ranks must call.
        """
        depth = len(self._student.blocks)
        sums = torch.zeros(2, 2, depth, device=self._topology.device)
        for kind, found in enumerate((self._entropy, self._cka)):
            for index, value in found.items():
                sums[kind, 0, index] = value
                sums[kind, 1, index] = 1.0
        if dist.is_initialized():
            dist.all_reduce(sums)
        means = sums[:, 0] / sums[:, 1].clamp(min=1)
        values: dict[str, Tensor] = {}
        for kind, name in enumerate(("attention_entropy", "cka")):
            values[name] = sums[kind, 0].sum() / sums[kind, 1].sum().clamp(min=1)
            alike = min(depth, len(self._teacher.blocks)) if name == "cka" else depth
            values |= {f"{name}/layer_{index + 1:02d}": means[kind, index] for index in range(alike)}
        return values

    def _hooks(self, batch: Batch) -> list[RemovableHandle]:
        valid_bt = self._student.valid_positions(batch)
        weight_rt = None if valid_bt is None else valid_bt[:ROWS].float()
        visible_bs = None
        if self._student.config.visible_only:
            assert batch.layout.visible_rs is not None
            visible_bs = batch.layout.visible_rs[: ROWS * batch.clones : batch.clones]
            weight_rt = None if weight_rt is None else weight_rt.gather(1, visible_bs)
        handles: list[RemovableHandle] = []
        for index, block in _here(self._student):
            handles += self._watch_attention(index, block, batch.clones, weight_rt)
            handles.append(self._watch_student(index, block, batch, visible_bs))
        # One that is another model may have more blocks.
        alike = (pair for pair in _here(self._teacher) if pair[0] < len(self._student.blocks))
        for index, block in alike:
            handles.append(self._watch_teacher(index, block, batch, visible_bs, weight_rt))
        return handles

    def _watch_attention(
        self, index: int, block: nn.Module, clones: int, weight_rs: Tensor | None
    ) -> tuple[RemovableHandle, RemovableHandle]:
        """`weight_rs`: as in `_watch_teacher`."""
        attention: Any = block.attention
        chosen = slice(None, ROWS * clones, clones)

        def keep_bias(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._biases[index] = inputs[1]

        def read_projection(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if index not in self._entropy:
                bias = self._biases[index]
                bias = bias if bias is None or bias.shape[0] == 1 else bias[chosen]
                self._entropy[index] = attention_entropy(attention, output[0].detach()[chosen], bias, weight_rs)

        return attention.register_forward_pre_hook(keep_bias), attention.qkv.register_forward_hook(read_projection)

    def _watch_student(self, index: int, block: nn.Module, batch: Batch, visible_bs: Tensor | None) -> RemovableHandle:
        def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if index not in self._states:
                states_rsd = output[0].detach()[: ROWS * batch.clones : batch.clones]
                seen = batch.masked_rt if visible_bs is None else visible_bs
                self._states[index] = _sample(_last(states_rsd, seen.shape[1]))

        return block.register_forward_hook(keep)

    def _watch_teacher(
        self, index: int, block: nn.Module, batch: Batch, visible_bs: Tensor | None, weight_rs: Tensor | None
    ) -> RemovableHandle:
        """`visible_bs`: the positions that the student has, None: all; `weight_rs`: which of them are not padding."""

        def compare(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if index in self._cka:
                return
            states_bsd = _last(output[0].detach()[:ROWS], batch.masked_rt.shape[1])
            if visible_bs is not None:
                states_bsd = states_bsd.gather(1, visible_bs[:, :, None].expand(-1, -1, states_bsd.shape[2]))
            weight_n = None if weight_rs is None else _sample(weight_rs)
            self._cka[index] = linear_cka(self._states[index], _sample(states_bsd), weight_n)

        return block.register_forward_hook(compare)


def _last(states_rsd: Tensor, length: int) -> Tensor:
    """Without the extra tokens in front."""
    return states_rsd[:, states_rsd.shape[1] - length :]


def _sample(x_rs: Tensor) -> Tensor:
    """Positions of all rows in one axis, evenly spaced, and a copy: the rest can be freed."""
    return x_rs.flatten(0, 1)[:: -(-x_rs.shape[0] * x_rs.shape[1] // POSITIONS)].clone()


def _here(network: Student | Teacher) -> Iterator[tuple[int, Block]]:
    """The main blocks that this rank runs; in a pipeline other stages have the others."""
    return ((index, block) for index, block in enumerate(network.blocks) if isinstance(block, Block))


def attention_entropy(attention: Any, qkv_rsd: Tensor, bias: Tensor | None, weight_rs: Tensor | None = None) -> Tensor:
    """Mean over local heads and queries of the entropy of attention over log(number of keys in reach), a scalar.

    `qkv_rsd`: the output of `attention.qkv`, rows ordered [head][q|k|v][head_dim]; `bias`: `Carry.attention_bias`;
    `weight_rs`: 0 for queries that do not count, without the extra tokens in front, which do.
    """
    rows, length, _ = qkv_rsd.shape
    parts = qkv_rsd.view(rows, length, attention.heads, 3, attention.head_dim)
    q_rhsd, k_rhsd, _ = parts.permute(3, 0, 2, 1, 4).float().unbind(0)
    if attention.split_bias:
        q_rhsd = q_rhsd + attention.q_bias.float().view(attention.heads, 1, attention.head_dim)
    chosen = slice(None, None, -(-length // QUERIES))
    scores_rhqk = q_rhsd[:, :, chosen] @ k_rhsd.transpose(2, 3) / math.sqrt(attention.head_dim)
    if bias is not None:
        bias = bias[:, :, chosen] if bias.shape[2] > 1 else bias
        hidden = bias.dtype == torch.bool
        scores_rhqk = scores_rhqk.masked_fill(~bias, -math.inf) if hidden else scores_rhqk + bias.float()
    keys_rhq = (scores_rhqk > -math.inf).sum(dim=-1).clamp(min=2)
    share_rhq = torch.special.entr(scores_rhqk.softmax(dim=-1)).sum(dim=-1) / keys_rhq.log()
    if weight_rs is None:
        return share_rhq.mean()
    weight_rq = F.pad(weight_rs, (length - weight_rs.shape[1], 0), value=1.0)[:, chosen]
    return (share_rhq.mean(dim=1) * weight_rq).sum() / weight_rq.sum().clamp(min=1)
