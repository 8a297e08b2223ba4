"""What an engine runs micro-batches into, whatever the topology."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data2vec.targets import Made


class Objective(Protocol):
    """What a step makes of its micro-batches: `step.StepLoss`, say."""

    reads_states: bool
    """Whether `share` is given the student's mean states."""

    def entered(self, batch: Batch, features_btd: Tensor) -> None:
        """The stem has made these features of a micro-batch; called where the stem is."""

    def share(
        self,
        batch: Batch,
        predictions: Sequence[Tensor],
        cls: Sequence[Tensor | None],
        made: Sequence[Made],
        means: Sequence[Tensor] = (),
    ) -> Tensor:
        """What a micro-batch adds to the loss, scaled for DeepSpeed's division, a scalar with gradient; called where
        predictions are made. Of every target its predictions (N, W), and what was made; `cls`: of every stem, see
        `StudentOutput`."""
