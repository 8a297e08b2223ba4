"""What the data plane hands to the training step. The letters that names of tensors end in: docs/method.md."""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Layout:
    """Where the masked and the visible positions are, as indices: known on the CPU, so that no kernel has to ask."""

    masked_n: Tensor
    """int64 (N,): masked positions, row-major, as r * T + t."""
    visible_rs: Tensor | None
    """int64 (R, S): positions t that each row keeps, ascending. None when the rows keep different numbers."""

    @classmethod
    def of(cls, masked_rt: Tensor) -> "Layout":
        """The layout of a mask (R, T)."""
        masked_n = masked_rt.flatten().nonzero().squeeze(1)
        counts_r = masked_rt.sum(dim=1)
        if counts_r.numel() and bool((counts_r != counts_r[0]).any()):
            return cls(masked_n=masked_n, visible_rs=None)
        rows, length = masked_rt.shape
        kept = length - int(counts_r[0]) if rows else 0
        return cls(masked_n=masked_n, visible_rs=(~masked_rt).nonzero()[:, 1].view(rows, kept))

    def to(self, device: torch.device) -> "Layout":
        """The same layout on `device` (non-blocking)."""
        visible_rs = None if self.visible_rs is None else self.visible_rs.to(device, non_blocking=True)
        return Layout(masked_n=self.masked_n.to(device, non_blocking=True), visible_rs=visible_rs)


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one rank: B samples for one stem, and the masks of their M clones.

    Rows of clones are sample-major: sample 0 clone 0, sample 0 clone 1, ..., sample 1 clone 0, ...
    """

    modality: str
    """Name of the stem that reads them."""
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
    labels: Tensor | None = None
    """Fine-tuning only: int64 (B,) classes, float32 (B,) scores or int64 (B, U) characters; -1 (NaN for scores) where
    there is none."""
    keys: tuple[str, ...] = ()
    """The samples' keys in their shards, for logs and previews."""
    source: str = ""
    """Which data source they come from."""
    epoch: int = 0
    lost: int = 0
    """Planned samples that are missing here because they could not be read."""
    grid: tuple[int, ...] = ()
    """How the T positions lie: extents of their axes, row-major. Empty: they are a line."""
    extra_tokens: int = 0
    """Positions that the encoder has before these (CLS)."""
    layout: Layout = None  # type: ignore[assignment]
    """Computed from `masked_rt` at construction, which should therefore be on the CPU."""

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = Layout.of(self.masked_rt)
        assert math.prod(self.extents) == self.masked_rt.shape[1], f"{self.grid} is not {self.masked_rt.shape[1]}"

    @property
    def extents(self) -> tuple[int, ...]:
        """Extents of the axes of the positions: `grid`, or (T,) of a line."""
        return self.grid or (self.masked_rt.shape[1],)

    @property
    def clones(self) -> int:
        """M, masks per sample."""
        return self.masked_rt.shape[0] // max(1, self.inputs.shape[0])

    @property
    def is_blank(self) -> bool:
        """Whether its one row stands for samples that are not there: nothing of it counts."""
        return self.keys == ("",)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device` (non-blocking)."""
        moved: dict[str, Tensor | Layout] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved["layout"] = self.layout.to(device)
        return replace(self, **moved)  # type: ignore[arg-type]

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to the device overlap with computation."""
        pinned: dict[str, Tensor | Layout] = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        visible_rs = None if self.layout.visible_rs is None else self.layout.visible_rs.pin_memory()
        pinned["layout"] = Layout(masked_n=self.layout.masked_n.pin_memory(), visible_rs=visible_rs)
        return replace(self, **pinned)  # type: ignore[arg-type]

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors, which were made on another."""
        tensors = [getattr(self, f.name) for f in fields(self)]
        for tensor in (*tensors, self.layout.masked_n, self.layout.visible_rs):
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)


def masked_targets(targets_btd: Tensor, batch: Batch) -> Tensor:
    """Targets (N, D) at the masked positions of all clones, in the order of the predictions."""
    samples, length, width = targets_btd.shape
    masked_n = batch.layout.masked_n
    # Row r of the clones belongs to sample r // M, so position r * T + t reads (r // M) * T + t.
    rows_n = torch.div(masked_n, length * batch.clones, rounding_mode="floor") * length + masked_n % length
    return targets_btd.reshape(samples * length, width).index_select(0, rows_n)
