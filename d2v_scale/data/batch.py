"""What the data plane hands to the training step."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from d2v_scale.model.config import Modality


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one rank: B samples of one modality, and the masks of their M clones.

    Rows of clones are sample-major: sample 0 clone 0, sample 0 clone 1, ..., sample 1 clone 0, ...
    """

    modality: Modality
    inputs: Tensor
    """What the teacher sees. speech: float32 (B, samples); vision: float32 (B, C, H, W); text: int64 (B, T)."""
    valid: Tensor | None
    """True where `inputs` is real: (B, samples) for speech, (B, T) for text. None: everything is real."""
    masked_rt: Tensor
    """bool (B*M, T), T in positions of the encoder (frames, patches, tokens). True: hidden from the student."""
    student_inputs: Tensor | None = None
    """What the student sees when it is not `inputs` (1.0 text: the tokens with <mask>). int64 (B, T)."""
    sample_ids: Tensor
    """int64 (B,): a name for each sample that is the same at any world size and in every epoch."""
    keys: tuple[str, ...] = ()
    """The samples' keys in their shards, for logs and previews."""
    source: str = ""
    """Which data source they come from."""
    epoch: int = 0
    lost: int = 0
    """Planned samples that are missing here because they could not be read."""

    @property
    def clones(self) -> int:
        """M, masks per sample."""
        return self.masked_rt.shape[0] // max(1, self.inputs.shape[0])

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device` (non-blocking)."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
