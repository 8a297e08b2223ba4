"""From decoded rows to a `Batch` with its masks."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.labels import Labels
from d2v_scale.data2vec import masking
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.data2vec.stateless import array_keys, array_uniform
from d2v_scale.errors import Verdict
from d2v_scale.model.config import ModelConfig
from d2v_scale.shards.plan import PlannedBatch
from d2v_scale.shards.reading import Fault, NothingHere, SampleFault, Store
from d2v_scale.shards.rows import Decoder, Row, Stacked


def read_rows(
    planned: PlannedBatch, store: Store, decoder: Decoder, seed: int
) -> tuple[list[Row], list[int], list[Fault]]:
    """The rows that can be delivered, their numbers in `planned`, and a fault for each of the others but those of a
    stream that holds nothing."""
    keys_n = array_keys(planned.sample_ids, "crop", seed)
    keys_n = array_keys(keys_n.view(np.int64) ^ planned.epoch_n, "epoch")
    draws_nk = array_uniform(keys_n, decoder.draws)
    rows, kept, faults = _read(planned, range(len(planned)), planned.length, draws_nk, store, decoder)
    while faults and (length := planned.length_of_read(kept)) > planned.length:
        # The shortest could not be read: its length, which nobody has seen, crops no other.
        planned = replace(planned, length=length)
        rows, kept, more = _read(planned, kept, length, draws_nk, store, decoder)
        faults += more
    return rows, kept, faults


def _read(
    planned: PlannedBatch,
    numbers: Iterable[int],
    length: int,
    draws_nk: NDArray[np.float64],
    store: Store,
    decoder: Decoder,
) -> tuple[list[Row], list[int], list[Fault]]:
    rows, kept, faults = [], [], []
    for k in numbers:
        shard, item = int(planned.shard_n[k]), int(planned.item_n[k])
        try:
            rows.append(decoder.training_row(store, shard, item, length, draws_nk[k]))
            kept.append(k)
        except SampleFault as error:
            faults.append(error.fault)
        except NothingHere:
            continue
        except Verdict:
            raise
        except Exception as error:  # a decoder raises anything for damaged content, and one sample must not end a run
            faults.append(store.describe(shard, item, f"cannot be decoded: {type(error).__name__}: {error}"))
    return rows, kept, faults


class Collator:
    """Makes batches for one stem: inputs, masks, and what a student reads where masks change the inputs (1.0 text)."""

    def __init__(
        self,
        modality: str,
        decoder: Decoder,
        model: ModelConfig,
        masks: MaskingConfig,
        compat: CompatConfig,
        seed: int,
        labels: Labels | None = None,
    ) -> None:
        """`labels`: how the rows' labels become those of the batch; None: rows have none."""
        self._modality = modality
        self._stem = modalities.of(model, modality)
        self._decoder = decoder
        self._masking = masks
        self._compat = compat
        self._seed = seed
        self._labels = labels

    def batch(
        self, rows: list[Row], planned: PlannedBatch, kept: list[int], *, step: int, source: str, lost: int
    ) -> Batch:
        """The batch of `rows`, which are the `kept` of `planned`.

        Where nothing could be read, or more ranks than samples leave a rank without any: one blank row with nothing
        masked, so that every rank runs the same layers and the loss does not change.
        """
        ids = planned.sample_ids[kept]
        epoch = int(planned.epoch_n[0]) if len(planned) else 0
        common: dict[str, Any] = {"modality": self._modality, "source": source, "epoch": epoch, "lost": lost}
        if not rows:
            stacked = self._decoder.stack([self._decoder.blank()])
            common |= self._geometry(stacked)
            nothing_rt = torch.zeros(self._masking.clones, stacked.positions, dtype=torch.bool)
            return Batch(
                inputs=stacked.inputs,
                valid=stacked.valid,
                masked_rt=nothing_rt,
                student_inputs=self._stem.student_inputs(stacked.inputs, masking.Masks(nothing_rt.numpy())),
                sample_ids=torch.full((1,), -1),
                labels=None if self._labels is None else self._labels.stack([None]),
                keys=("",),
                **common,
            )
        stacked = self._decoder.stack([row.values for row in rows])
        common |= self._geometry(stacked)
        masks = masking.collate(
            self._masking,
            length=stacked.length,
            grid=stacked.grid,
            sample_ids=ids,
            valid_lengths=stacked.valid_lengths,
            seed=self._seed,
            step=step,
            compat=self._compat,
            equal_counts=self._stem.model.visible_only,
            real_bt=stacked.real_bt,
        )
        inputs, valid = stacked.inputs, stacked.valid
        student_inputs = self._stem.student_inputs(inputs, masks)
        if student_inputs is not None and self._compat.text_teacher_masked_only:
            inputs, valid = self._stem.masked_only(inputs, valid, torch.from_numpy(masks.masked_rt))
        return Batch(
            inputs=inputs,
            valid=valid,
            masked_rt=torch.from_numpy(masks.masked_rt),
            student_inputs=student_inputs,
            sample_ids=torch.from_numpy(ids),
            labels=None if self._labels is None else self._labels.stack([row.label for row in rows]),
            keys=tuple(row.key for row in rows),
            **common,
        )

    def _geometry(self, stacked: Stacked) -> dict[str, Any]:
        real_bt = None if stacked.real_bt is None else torch.from_numpy(stacked.real_bt)
        return {
            "grid": stacked.grid or (),
            "extra_tokens": self._stem.extra_tokens,
            "real_bt": real_bt,
            "missing": stacked.missing,
        }
