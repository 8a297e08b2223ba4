"""What a kind of samples looks like in a picture: the part of `modalities` that needs matplotlib."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from d2v_scale.batch import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sample = Tensor | str
"""An image (C, H, W), a waveform (samples,) or a text."""


class Drawing(ABC):
    """How samples of one kind, their masks and their features are drawn."""

    @abstractmethod
    def masks(self, batch: Batch, masked_bmt: np.ndarray, decode: Callable[[int], str] | None) -> "Figure":
        """The first samples of a batch with the masks (B, M, T) of their clones. `decode`: a token id to its text."""

    @abstractmethod
    def sample(self, batch: Batch, row: int, decode: Callable[[list[int]], str] | None) -> Sample:
        """One sample, without padding. `decode`: token ids to text."""

    def features(
        self, batch: Batch, states_btd: Tensor, valid_bt: Tensor | None, labels: list[str], place: Callable[[str], Path]
    ) -> list[Path]:
        """Pictures of the teacher's states of the first samples (B, T, D) of a batch, where there are such; the
        files. `place`: where the file of a name belongs."""
        del batch, states_btd, valid_bt, labels, place
        return []
