"""What the data plane hands to the training step. The letters that names of tensors end in: docs/method.md."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Layout:
    """Where the masked and the visible positions are, as indices: known on the CPU, so that no kernel has to ask."""

    masked_n: Tensor
    """int64 (N,): masked positions, row-major, as r * T + t."""
    visible_rs: Tensor | None = None
    """int64 (R, S): positions t that each row keeps, ascending. None when the rows keep different numbers."""
    decoded_n: Tensor | None = None
    """int64: positions that a predictor gives something for, ascending, where they are more than `masked_n`: of rows in
    which a whole part is hidden, those too that the encoder has queries for. None: `masked_n`."""
    counted_n: Tensor | None = None
    """int64: which of `outputs_n` are predicted. None: all."""

    @classmethod
    def of(cls, masked_rt: Tensor, real_bt: Tensor | None = None) -> "Layout":
        """The layout of a mask (R, T), of which the positions `real_bt` (None: all) are predicted where masked."""
        counts_r = masked_rt.sum(dim=1)
        visible_rs = counted_n = None
        if not counts_r.numel() or not bool((counts_r != counts_r[0]).any()):
            rows, length = masked_rt.shape
            kept = length - int(counts_r[0]) if rows else 0
            visible_rs = (~masked_rt).nonzero()[:, 1].view(rows, kept)
        if real_bt is not None:
            real_rt = real_bt.repeat_interleave(len(masked_rt) // max(1, len(real_bt)), dim=0)
            counted_n = real_rt[masked_rt].nonzero().squeeze(1)
        masked_n = masked_rt.flatten().nonzero().squeeze(1)
        return cls(masked_n=masked_n, visible_rs=visible_rs, counted_n=counted_n)

    @property
    def outputs_n(self) -> Tensor:
        """int64 (N,): positions that a predictor gives something for."""
        return self.masked_n if self.decoded_n is None else self.decoded_n

    @property
    def predicted_n(self) -> Tensor:
        """int64 (N,): of `outputs_n` what is predicted."""
        return self.outputs_n if self.counted_n is None else self.outputs_n.index_select(0, self.counted_n)

    def predicted(self, x_nd: Tensor) -> Tensor:
        """Of rows that belong to `outputs_n` those of `predicted_n`."""
        return x_nd if self.counted_n is None else x_nd.index_select(0, self.counted_n)

    @property
    def predictions(self) -> int:
        """How many positions are predicted, known without waiting for a device."""
        return (self.outputs_n if self.counted_n is None else self.counted_n).numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Layout":
        """The same layout with other tensors."""
        return replace(self, **{name: change(x) for name, x in self.tensors.items()})


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one rank: B samples for one stem, and the masks of their M clones.

    Rows of clones are sample-major: sample 0 clone 0, sample 0 clone 1, ..., sample 1 clone 0, ...
    """

    modality: str
    """Name of the stem that reads them."""
    inputs: Tensor
    """What the teacher sees. speech: float32 (B, samples); vision: float32 (B, C, H, W); text: int64 (B, T); arrays:
    float32 (B, C, E_1 ... E_n)."""
    valid: Tensor | None
    """True where `inputs` is real: (B, samples) for speech, (B, T) for text and arrays. None: everything is real."""
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
    real_bt: Tensor | None = None
    """bool (B, T): positions that may be predicted, where masks also hide what is padding or missing. None: all that
    are masked."""
    missing: int = 0
    """Positions that hold no value."""
    parts: tuple["Batch", ...] = ()
    """Of paired samples: a batch for each stem, all of the same samples and clones in the same order, whose positions
    together are those of this one, after all extra tokens. `inputs` is empty then, and so is `real_bt`."""
    present_b: Tensor | None = None
    """bool (B,): samples that have this part. None: all have."""
    absent: int = 0
    """How many have not, known without waiting for a device."""
    hidden_r: Tensor | None = None
    """bool (B*M,): rows in which this part is hidden altogether. None: it is hidden in none."""
    layout: Layout = None  # type: ignore[assignment]
    """Computed from `masked_rt` at construction, which should therefore be on the CPU."""

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = Layout.of(self.masked_rt, self.real_bt)
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

    @property
    def of_stems(self) -> tuple["Batch", ...]:
        """What single stems read: the parts of paired samples, in the order of their positions, or this batch."""
        return self.parts or (self,)

    def places_n(self, read_n: Tensor) -> Tensor:
        """Where the flat positions `read_n`, r * T + t, of a batch of one stem lie among states (R, n + T, D)."""
        length, extra = self.masked_rt.shape[1], self.extra_tokens
        return read_n if extra == 0 else read_n + (read_n // length + 1) * extra

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by field; without the layout's and the parts'."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with other tensors."""
        return replace(
            self,
            **{name: change(x) for name, x in self.own_tensors().items()},  # type: ignore[arg-type]
            layout=self.layout.mapped(change),
            parts=tuple(part.mapped(change) for part in self.parts),
        )

    def all_tensors(self) -> Iterator[Tensor]:
        """Those of the batch, of its layout and of its parts."""
        yield from self.own_tensors().values()
        yield from self.layout.tensors.values()
        for part in self.parts:
            yield from part.all_tensors()

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device` (non-blocking)."""
        return self.mapped(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to the device overlap with computation."""
        return self.mapped(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors, which were made on another."""
        for tensor in self.all_tensors():
            tensor.record_stream(stream)


def masked_targets(targets_btd: Tensor, batch: Batch) -> Tensor:
    """Targets (N, D) at the predicted positions of all clones, in the order of the predictions."""
    samples, length, width = targets_btd.shape
    masked_n = batch.layout.predicted_n
    # Row r of the clones belongs to sample r // M, so position r * T + t reads (r // M) * T + t.
    rows_n = torch.div(masked_n, length * batch.clones, rounding_mode="floor") * length + masked_n % length
    return targets_btd.reshape(samples * length, width).index_select(0, rows_n)
