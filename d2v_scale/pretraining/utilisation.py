"""Model FLOPs utilisation of a run: useful FLOPs of what was trained on, over the peak of the devices."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec.targets import Target
from d2v_scale.modalities.costs import Lengths
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import parts_of
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.parallel.groups import Topology
from d2v_scale.planning.flops import SampleCost, sample_cost
from d2v_scale.planning.hardware import bf16_peak


class FlopMeter:
    """Counts the FLOPs of micro-batches by their shapes (padding counts as data), without asking the device."""

    def __init__(
        self,
        model: ModelConfig,
        parts: TeacherParts,
        topology: Topology,
        peak_tflops: float | None = None,
        targets: Mapping[str, Sequence[Target]] | None = None,
        teacher: ModelConfig | None = None,
        reads_states: Collection[str] = (),
    ) -> None:
        """`targets`, of each stem, and `teacher`: as for `sample_cost`. `peak_tflops`: of one device; None: known for
        some GPUs by name, and elsewhere there is no utilisation. `reads_states`: stems whose loss reads states at all
        positions."""
        self._topology = topology
        self._peak = None if peak_tflops is None else peak_tflops * 1e12
        if self._peak is None and topology.device.type == "cuda":
            self._peak = bf16_peak(torch.cuda.get_device_name(topology.device))
        self.restart()
        self._visible_only = model.visible_only

        @lru_cache(maxsize=1024)
        def cost(modality: str, lengths: Lengths) -> SampleCost:
            states = not {*parts_of(modality)}.isdisjoint(reads_states)
            return sample_cost(model, modality, lengths, parts, targets or {}, teacher, reads_states=states)

        self._cost = cost

    def restart(self) -> None:
        """Count from here."""
        self._flops = [0.0, 0.0]

    def count(self, batches: list[Batch]) -> None:
        """One step of this rank. Local."""
        for batch in batches:
            cost = self._cost(batch.modality, lengths_of_batch(batch, self._visible_only))
            self._flops[0] += batch.inputs.shape[0] * cost.total
            self._flops[1] += batch.inputs.shape[0] * cost.student_only

    def figures(self, elapsed_s: float) -> dict[str, float]:
        """Since the last call, `elapsed_s` seconds ago: `tflops_per_device`, and where the peak is known `mfu` (teacher
        included) and `mfu_student`. Waits for the device. Collective: all ranks must call."""
        total = torch.tensor(self._flops, dtype=torch.float64, device=self._topology.device)
        self._topology.sum_over_replicas(total)
        self.restart()
        rate, student_rate = (total / (elapsed_s * self._topology.world_size)).tolist()
        values = {"tflops_per_device": rate / 1e12}
        if self._peak is not None:
            values |= {"mfu": rate / self._peak, "mfu_student": student_rate / self._peak}
        return values


def lengths_of_batch(batch: Batch, visible_only: bool) -> Lengths:
    """Lengths of a sample of this batch; the masked positions are the mean over its rows. Of paired samples those with
    all parts: what one lacks is padding, which counts as data."""
    if batch.parts:
        return Lengths.together({part.modality: lengths_of_batch(part, visible_only) for part in batch.parts})
    rows, positions = batch.masked_rt.shape
    visible_rs = batch.layout.visible_rs
    return Lengths(
        inputs=batch.inputs.shape[-1],
        grid=batch.extents,
        kept=visible_rs.shape[1] if visible_only and visible_rs is not None else positions,
        masked=round(batch.layout.outputs_n.numel() / max(1, rows)),
        extra=batch.extra_tokens,
        clones=batch.clones,
    )
