"""What the layers do at the steps that are logged: how widely the student attends, and how alike both networks see.

Read by hooks from the forward passes that train anyway, on a few rows of the step's first micro-batch: no extra
forward, the same at every ZeRO stage, and each rank looks at the layers it runs.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_scale.data.batch import Batch
from d2v_scale.data2vec.statistics import linear_cka
from d2v_scale.model.block import Block
from d2v_scale.model.stack import Student, Teacher
from d2v_scale.parallel.groups import Topology

ROWS = 4
"""Samples looked at on each rank."""
QUERIES = 64
"""Positions of a row whose attention is measured, evenly spaced."""
POSITIONS = 512
"""Positions over all rows that the two networks are compared at."""


class LayerProbe:
    """Attention entropy of the student's main blocks, and their similarity (CKA) to the teacher's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, topology: Topology) -> None:
        """Hooks into the main blocks of a `Student` and a `Teacher`; they do nothing until `arm`."""
        student, teacher = cast(Student, student), cast(Teacher, teacher)
        self._topology = topology
        self._depth = len(student.blocks)
        self._batch: Batch | None = None
        self._valid_positions = student.valid_positions
        self._valid: Tensor | None = None
        self._biases: dict[int, Tensor | None] = {}
        self._entropy: dict[int, Tensor] = {}
        self._states: dict[tuple[int, bool], Tensor] = {}
        self._cka: dict[int, Tensor] = {}
        for index, block in _here(student):
            self._watch_student(index, block)
            self._watch_states(index, block, of_student=True)
        for index, block in _here(teacher):
            self._watch_states(index, block, of_student=False)

    def arm(self, batch: Batch) -> None:
        """Watch the step whose first micro-batch on this rank is `batch`. Local."""
        self._batch = batch
        valid_bt = self._valid_positions(batch)
        self._valid = None if valid_bt is None else valid_bt[:ROWS].float()
        self._biases, self._entropy, self._states, self._cka = {}, {}, {}, {}

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """`attention_entropy/layer_<n>`: mean over heads and queries, in parts of the entropy of attending everywhere
        alike; `cka/layer_<n>`: linear CKA of student (masked) and teacher (unmasked) at the positions both have. Layers
        count from 1, with a mean over all of them under `attention_entropy` and `cka`. Collective: all ranks must call.
        """
        self._batch, self._states, self._biases = None, {}, {}
        sums = torch.zeros(2, 2, self._depth, device=self._topology.device)
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
            values |= {f"{name}/layer_{index + 1:02d}": means[kind, index] for index in range(self._depth)}
        return values

    def _watch_student(self, index: int, block: nn.Module) -> None:
        attention: Any = block.attention

        def keep_bias(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._batch is not None:
                self._biases[index] = inputs[1]

        def read_projection(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # With activation checkpointing the backward pass runs the block again: once is enough.
            if self._batch is not None and index not in self._entropy:
                with torch.no_grad():
                    self._entropy[index] = attention_entropy(attention, output[0].detach(), self._biases[index])

        attention.register_forward_pre_hook(keep_bias)
        attention.qkv.register_forward_hook(read_projection)

    def _watch_states(self, index: int, block: nn.Module, *, of_student: bool) -> None:
        def keep(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._batch is None or index in self._cka or (index, of_student) in self._states:
                return
            clones = self._batch.clones if of_student else 1
            self._states[index, of_student] = output[0].detach()[: ROWS * clones : clones]
            if (index, not of_student) in self._states:
                with torch.no_grad():
                    self._cka[index] = self._compare(self._states.pop((index, True)), self._states.pop((index, False)))

        block.register_forward_hook(keep)

    def _compare(self, student_rsd: Tensor, teacher_rsd: Tensor) -> Tensor:
        """CKA at the positions that both networks have, padding left out. The first clone of each sample."""
        batch, weight_rs = self._batch, self._valid
        assert batch is not None
        length = batch.masked_rt.shape[1]
        teacher_rsd = teacher_rsd[:, teacher_rsd.shape[1] - length :]  # without CLS
        if student_rsd.shape[1] < length:  # 2.0: the student has the visible positions only
            assert batch.layout.visible_rs is not None
            visible_rs = batch.layout.visible_rs[: ROWS * batch.clones : batch.clones]
            student_rsd = student_rsd[:, student_rsd.shape[1] - visible_rs.shape[1] :]
            teacher_rsd = teacher_rsd.gather(1, visible_rs[:, :, None].expand(-1, -1, teacher_rsd.shape[2]))
            weight_rs = None if weight_rs is None else weight_rs.gather(1, visible_rs)
        else:
            student_rsd = student_rsd[:, student_rsd.shape[1] - length :]
        step = -(-student_rsd.shape[0] * student_rsd.shape[1] // POSITIONS)
        x_nd, y_nd = (states_rsd.flatten(0, 1)[::step] for states_rsd in (student_rsd, teacher_rsd))
        return linear_cka(x_nd, y_nd, None if weight_rs is None else weight_rs.flatten()[::step])


def _here(network: Student | Teacher) -> Iterator[tuple[int, Block]]:
    """The main blocks that this rank runs; in a pipeline other stages have the others."""
    return ((index, block) for index, block in enumerate(network.blocks) if isinstance(block, Block))


def attention_entropy(attention: Any, qkv_rsd: Tensor, bias: Tensor | None) -> Tensor:
    """Mean entropy of the attention of `ROWS` rows of local heads over log(number of keys), a scalar.

    `qkv_rsd`: the output of `attention.qkv`, rows ordered [head][q|k|v][head_dim]; `bias`: `Carry.attention_bias`.
    Keys that the bias hides count among the number of keys.
    """
    rows, length, _ = qkv_rsd.shape
    rows = min(rows, ROWS)
    parts = qkv_rsd[:rows].view(rows, length, attention.heads, 3, attention.head_dim)
    q_rhsd, k_rhsd, _ = parts.permute(3, 0, 2, 1, 4).float().unbind(0)
    if attention.split_bias:
        q_rhsd = q_rhsd + attention.q_bias.float().view(attention.heads, 1, attention.head_dim)
    chosen = slice(None, None, -(-length // QUERIES))
    scores_rhqk = q_rhsd[:, :, chosen] @ k_rhsd.transpose(2, 3) / math.sqrt(attention.head_dim)
    if bias is not None:
        bias = bias[:rows, :, chosen] if bias.shape[2] > 1 else bias[:rows]
        hidden = bias.dtype == torch.bool
        scores_rhqk = scores_rhqk.masked_fill(~bias, -math.inf) if hidden else scores_rhqk + bias.float()
    share_rhqk = scores_rhqk.softmax(dim=-1)
    return torch.special.entr(share_rhqk).sum(dim=-1).mean() / math.log(max(2, length))
