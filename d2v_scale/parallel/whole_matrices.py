"""Whole matrices for Muon, out of the flat pieces that ZeRO and tensor parallelism leave on every rank.

Every rank writes what it holds into zeros, and a sum over the ranks of its pipeline stage makes matrices of that, bit
by bit: x + 0 is x. Each matrix is orthogonalised by one rank, and a second sum hands the results round.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.muon import MatrixOptimizer, direction, structure_of
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.shards import Shard

if TYPE_CHECKING:
    from d2v_scale.parallel.zero import StudentEngine

BUCKET = 1 << 24
"""Values that are gathered at once, or one matrix where that is larger."""


@dataclass(frozen=True)
class _Held:
    """A matrix parameter, and what this rank has of it."""

    shape: tuple[int, ...]
    """Of the whole."""
    structure: tuple[int, int]
    shard: Shard | None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class WholeMatrices:
    """Takes a flat master of matrices and its momentum to what the master is moved along. Collective over the ranks of
    a pipeline stage, which call with the same masters in the same order."""

    def __init__(self, student: "StudentEngine", optimizer: MatrixOptimizer) -> None:
        self._topology: Topology = student.topology
        self._iterations = optimizer.iterations
        self._dtype = next(student.module.parameters()).dtype
        self._held = dict(_held_by_master(student, optimizer))

    def holds(self, master: Tensor) -> bool:
        """Whether a flat master is of matrices."""
        return id(master) in self._held

    def __call__(self, master: Tensor, momentum: Tensor) -> Tensor:
        """Flat to flat, fp32, on the master's device. `momentum`: one value for each of the master's."""
        moved, place, turn = torch.zeros_like(momentum), self._topology, 0
        ranks = place.data_parallel_size * place.tensor_size
        rank = place.data_parallel_rank * place.tensor_size + place.tensor_rank
        held = self._held[id(master)]
        for parts in in_buckets(held, [part.numel for part in held]):
            sizes = [part.numel for part in parts]
            whole = torch.zeros(sum(sizes), device=place.device)
            matrices = [x.view(part.shape) for x, part in zip(whole.split(sizes), parts, strict=True)]
            for matrix, part in zip(matrices, parts, strict=True):
                # What all tensor-parallel ranks have whole is written by the first.
                if part.shard is not None and (part.shard.slice is not None or place.tensor_rank == 0):
                    _write(matrix, part.shard, momentum)
            self._sum(whole, ranks)
            for number, (matrix, part) in enumerate(zip(matrices, parts, strict=True)):
                if (turn + number) % ranks == rank:
                    matrix.copy_(direction(matrix, part.structure, self._iterations, self._dtype))
                else:
                    matrix.zero_()
            turn += len(parts)
            self._sum(whole, ranks)
            for matrix, part in zip(matrices, parts, strict=True):
                if part.shard is not None:
                    _read(matrix, part.shard, moved)
        return moved

    def _sum(self, whole: Tensor, ranks: int) -> None:
        if ranks > 1:
            dist.all_reduce(whole, group=self._topology.stage_group)


def bind(student: "StudentEngine") -> None:
    """Where the student's optimizer is Muon's, have it see whole matrices. Local; once the engine is built."""
    optimizer = student.optimizer
    if isinstance(optimizer, MatrixOptimizer):
        student.matrices = WholeMatrices(student, optimizer)
        optimizer.directions = student.matrices


def _held_by_master(student: "StudentEngine", optimizer: MatrixOptimizer) -> Iterator[tuple[int, list[_Held]]]:
    zero: Any = student.engine.optimizer
    named = dict(student.module.named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    shards = {shard.name: shard for shard in student.shards()}
    shapes = student.local_shapes()
    groups = zero.fp16_groups if student.stage == 3 else zero.bit16_groups
    for index, (master, group) in enumerate(zip(student.masters(), groups, strict=True)):
        number = zero.sub_group_to_group_id[index] if student.stage == 3 else index
        if optimizer.param_groups[number]["is_matrix"]:
            # In one order on all ranks, whatever order DeepSpeed keeps.
            members = sorted(names[id(parameter)] for parameter in group)
            yield id(master), [_Held(shapes[n], structure_of(named[n]), shards.get(n)) for n in members]


T = TypeVar("T")


def in_buckets(items: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """Runs of items of no more than BUCKET values together, or one that is larger."""
    run: list[T] = []
    room = BUCKET
    for item, size in zip(items, sizes, strict=True):
        if run and size > room:
            yield run
            run, room = [], BUCKET
        run.append(item)
        room -= size
    if run:
        yield run


def _sliced(matrix: Tensor, shard: Shard) -> Tensor:
    return matrix if shard.slice is None else matrix.chunk(shard.slice.count, shard.slice.dim)[shard.slice.index]


def _write(matrix: Tensor, shard: Shard, flat: Tensor) -> None:
    values = flat.narrow(0, shard.offset, shard.numel)
    own = _sliced(matrix, shard)
    scratch = own if own.is_contiguous() else torch.zeros_like(own, memory_format=torch.contiguous_format)
    scratch.view(-1).narrow(0, shard.start, shard.numel).copy_(values)
    if scratch is not own:
        own.copy_(scratch)


def _read(matrix: Tensor, shard: Shard, flat: Tensor) -> None:
    values = _sliced(matrix, shard).reshape(-1).narrow(0, shard.start, shard.numel)
    flat.narrow(0, shard.offset, shard.numel).copy_(values)
