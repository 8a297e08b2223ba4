"""From decoded rows of paired samples to a `Batch` with a part for each stem."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale.batch import Batch, Layout
from d2v_scale.data.labels import Labels
from d2v_scale.data2vec import masking
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.data2vec.hiding import hidden_parts
from d2v_scale.data2vec.row_draws import Bools
from d2v_scale.modalities import Modality
from d2v_scale.modalities.paired.decoder import PairedDecoder, Values
from d2v_scale.modalities.paired.modality import Paired
from d2v_scale.shards.plan import PlannedBatch
from d2v_scale.shards.rows import Decoder, PartDecoder, Row, Stacked


class PairedCollator:
    """Makes batches of samples of several stems: of each part inputs and masks by its stem's own policy, and which
    parts are hidden altogether."""

    def __init__(
        self,
        sequence: Paired,
        decoder: PairedDecoder,
        masks: list[MaskingConfig],
        hide_whole: float | None,
        seed: int,
        labels: Labels | None = None,
    ) -> None:
        """`masks`: of each part; `hide_whole`: probability that a part is hidden altogether, None: none ever is."""
        self._sequence, self._decoder, self._masks = sequence, decoder, masks
        self._hide_whole, self._seed, self._labels = hide_whole, seed, labels
        self._clones = masks[0].clones

    def batch(
        self, rows: list[Row], planned: PlannedBatch, kept: list[int], *, step: int, source: str, lost: int
    ) -> Batch:
        """The batch of `rows`, which are the `kept` of `planned`; without any, of one row that has no part, so that
        every rank runs the same layers and the loss does not change."""
        ids = planned.sample_ids[kept] if rows else np.array([-1])
        keys = tuple(row.key for row in rows) or ("",)
        epoch = int(planned.epoch_n[0]) if len(planned) else 0
        values: list[Values] = [row.values for row in rows] or [self._decoder.blank()]  # type: ignore[misc]
        present_bp = np.array([[one is not None for one in row] for row in values])
        hidden_rp: Bools | None = None
        if self._hide_whole is not None:
            hidden_rp = hidden_parts(
                self._hide_whole, present_bp, self._clones, sample_ids=ids, seed=self._seed, step=step
            )
        common = {"sample_ids": torch.from_numpy(ids), "keys": keys, "epoch": epoch}
        parts = []
        longest_p: Sequence[int | None] = planned.longest_p or (None,) * len(self._sequence.parts)
        for number, (stem, longest) in enumerate(zip(self._sequence.parts, longest_p, strict=True)):
            hidden_r = None if hidden_rp is None else hidden_rp[:, number]
            decoder = self._decoder.parts[number].decoder
            own = [row[number] for row in values]
            part = self._part(stem, decoder, self._masks[number], own, ids, hidden_r, step, longest)
            parts.append(dataclasses.replace(part, **common, source=f"{source}/{stem.name}"))  # type: ignore[arg-type]
        labels = None
        if self._labels is not None:
            labels = self._labels.stack([row.label for row in rows] or [None])
        return joined(tuple(parts), self._sequence.name, source=source, lost=lost, labels=labels)

    def _part(
        self,
        stem: Modality,
        decoder: PartDecoder,
        masks: MaskingConfig,
        values: list[NDArray[Any] | None],
        ids: NDArray[np.int64],
        hidden_r: Bools | None,
        step: int,
        longest: int | None,
    ) -> Batch:
        """One stem's part of all samples; where a sample has none, a blank row of which nothing is seen or counted.

        Padding is more than waste: 2.0 masks a share of all positions, and norms over positions have it in their
        statistics. So there is as much of it as if all ranks' rows were in one batch (`longest`; None: not known, of
        shards without an index).
        """
        blank = decoder.blank()
        present_b = np.array([value is not None for value in values])
        stacked = decoder.stack([blank if value is None else value for value in values], longest)
        real_bt = _real(stacked, present_b)
        drawn = masking.collate(
            masks,
            length=stacked.length,
            grid=stacked.grid,
            sample_ids=ids,
            valid_lengths=stacked.valid_lengths,
            seed=self._seed,
            step=step,
            equal_counts=stem.model.visible_only,
            real_bt=real_bt,
        )
        policy_rt = drawn.masked_rt
        if hidden_r is not None:
            real_rt = True if real_bt is None else np.repeat(real_bt, masks.clones, axis=0)
            drawn.masked_rt = policy_rt | (hidden_r[:, None] & real_rt)
        real = None if real_bt is None else torch.from_numpy(real_bt)
        masked_rt = torch.from_numpy(drawn.masked_rt)
        layout = Layout.of(masked_rt, real)
        if stem.model.visible_only and hidden_r is not None:
            layout = with_queries(torch.from_numpy(policy_rt), torch.from_numpy(hidden_r), real)
        return Batch(
            modality=stem.name,
            inputs=stacked.inputs,
            valid=stacked.valid,
            masked_rt=masked_rt,
            student_inputs=stem.student_inputs(stacked.inputs, drawn),
            sample_ids=torch.from_numpy(ids),
            grid=stacked.grid or (),
            extra_tokens=stem.extra_tokens,
            real_bt=real,
            missing=stacked.missing,
            present_b=None if present_b.all() else torch.from_numpy(present_b),
            absent=int((~present_b).sum()),
            hidden_r=None if hidden_r is None else torch.from_numpy(hidden_r),
            layout=layout,
        )


def joined(
    parts: tuple[Batch, ...], sequence: str, *, source: str = "", lost: int = 0, labels: torch.Tensor | None = None
) -> Batch:
    """The batch of these parts of the same samples, in the order of their positions."""
    first = parts[0]
    visible, before = [], 0
    for part in parts:
        if part.layout.visible_rs is not None:
            visible.append(part.layout.visible_rs + before)
        before += part.masked_rt.shape[1]
    masked_rt = torch.cat([part.masked_rt for part in parts], dim=1)
    return Batch(
        modality=sequence,
        inputs=first.inputs.new_empty(len(first.inputs), 0),
        valid=None,
        masked_rt=masked_rt,
        sample_ids=first.sample_ids,
        labels=labels,
        keys=first.keys,
        source=source,
        epoch=first.epoch,
        lost=lost,
        extra_tokens=sum(part.extra_tokens for part in parts),
        missing=sum(part.missing for part in parts),
        parts=parts,
        layout=Layout(
            masked_n=masked_rt.flatten().nonzero().squeeze(1),
            visible_rs=torch.cat(visible, dim=1) if len(visible) == len(parts) else None,
        ),
    )


def unmasked_pairs(
    sequence: Paired, decoders: Sequence[Decoder], rows: Sequence[Values], ids: torch.Tensor, keys: tuple[str, ...]
) -> Batch:
    """A batch of decoded rows, with a part or None for each stem, of which nothing is masked. `ids`: int64 (B,)."""
    parts = []
    for number, (stem, decoder) in enumerate(zip(sequence.parts, decoders, strict=True)):
        blank = decoder.blank()
        present_b = np.array([row[number] is not None for row in rows])
        stacked = decoder.stack([blank if row[number] is None else row[number] for row in rows])  # type: ignore[misc]
        real_bt = _real(stacked, present_b)
        parts.append(
            Batch(
                modality=stem.name,
                inputs=stacked.inputs,
                valid=stacked.valid,
                masked_rt=torch.zeros(len(rows), stacked.positions, dtype=torch.bool),
                sample_ids=ids,
                keys=keys,
                grid=stacked.grid or (),
                extra_tokens=stem.extra_tokens,
                real_bt=None if real_bt is None else torch.from_numpy(real_bt),
                present_b=None if present_b.all() else torch.from_numpy(present_b),
                absent=int((~present_b).sum()),
            )
        )
    return joined(tuple(parts), sequence.name)


def _real(stacked: Stacked, present_b: Bools) -> Bools | None:
    """bool (B, T): what of a part may be predicted. None: all of it. Padding never is: parts are as long as they are
    beside the others, so that much of a batch may be padding."""
    real_bt = stacked.real_bt
    if real_bt is None and stacked.valid_lengths is not None:
        real_bt = np.arange(stacked.positions) < stacked.valid_lengths.reshape(-1, 1)
    if present_b.all():
        return real_bt
    there_bt = np.repeat(present_b[:, None], stacked.positions, axis=1)
    return there_bt if real_bt is None else real_bt & there_bt


def with_queries(policy_rt: torch.Tensor, hidden_r: torch.Tensor, real_bt: torch.Tensor | None) -> Layout:
    """The layout of a 2.0 part: in rows where it is hidden the encoder has queries at the positions that its policy
    would show, and these are predicted, too."""
    layout = Layout.of(policy_rt, real_bt)
    assert layout.visible_rs is not None, "rows of a 2.0 batch must keep equal numbers of positions"
    if bool(hidden_r.any()):
        decoded_rt = policy_rt | hidden_r[:, None]
        whole = Layout.of(decoded_rt, real_bt)
        layout.decoded_n, layout.counted_n = whole.masked_n, whole.counted_n
    return layout
