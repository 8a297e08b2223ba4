"""A checkpoint of another resolution: its tables of positions laid over the grid of the model at hand."""

from collections.abc import Mapping

from torch import Tensor

from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.model.position_tables import PositionTable
from d2v_scale.parallel.shards import TensorSlice, part_of


class OtherGrid(Checkpoint):
    """Weights, the teacher's weights and moments of a table are laid over alike: what the optimizer knows of a place it
    then knows of the places that came of it. The mean of squares is interpolated linearly, and so stays one."""

    def __init__(self, checkpoint: Checkpoint, tables: Mapping[str, tuple[PositionTable, PositionTable]]) -> None:
        """`tables`: by parameter, what the checkpoint has and what is wanted, of as many axes."""
        super().__init__(checkpoint.path, checkpoint.manifest)
        self._tables = tables

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """As it is wanted."""
        if name not in self._tables:
            return super().shape(kind, name)
        rows, *others = super().shape(kind, name)
        was, wanted = self._tables[name]
        return rows + wanted.places - was.places, *others

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor, fp32, on the CPU."""
        found = super().tensor(kind, name)
        if name not in self._tables:
            return found
        was, wanted = self._tables[name]
        return was.laid_over(found, wanted, non_negative=kind == "exp_avg_sq")

    def read(self, kind: str, name: str, cut: TensorSlice | None, start: int, numel: int) -> Tensor:
        """The flat range [start, start + numel) of a slice of a tensor. Of a table the whole is read."""
        if name in self._tables:
            return part_of(self.tensor(kind, name), cut, start, numel)
        return super().read(kind, name, cut, start, numel)
