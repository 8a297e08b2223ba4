"""The held-out loss: of fixed masks, over all batches, without disturbing the student."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from small_shards import documents

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.data.config import DataConfig, TextData
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data2vec.config import LossConfig, MaskingConfig, TargetConfig
from d2v_scale.data2vec.targets import Made, Place, build_all
from d2v_scale.evaluation.held_out import HeldOutSet
from d2v_scale.modalities.text.decoder import TokenCounter
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem
from d2v_scale.parallel import groups
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.shards.writing import write_set
from d2v_scale.teacher.sharded import ShardedTeacher

ONE = build_all([TargetConfig(top_k_layers=1)], Place(depth=2, width=32, input_width=None))
TARGETS = torch.randn(9, 16, 32, generator=torch.Generator().manual_seed(0))


class Module(torch.nn.Module):
    """Predicts the targets with an error of a given size; complains when it is in training mode."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error
        self.blocks = torch.nn.ModuleList()  # nothing for the probe to look at
        self.config = SimpleNamespace(visible_only=False, backbone=SimpleNamespace(width=32))
        self.seen: list[int] = []

    def valid_positions(self, batch: Batch) -> None:
        del batch

    def forward(self, batch: Batch, draw: object) -> SimpleNamespace:
        del draw
        assert not self.training
        self.seen.append(len(batch.inputs))
        predictions_nd = masked_targets(targets_of(batch), batch) + self.error
        return SimpleNamespace(predictions=(predictions_nd,), features_btd=None, encoder_rsd=None, cls=(None,))


class TeacherOfFixedTargets(ShardedTeacher):
    def __init__(self) -> None:
        """Nothing of the real one is needed."""
        self.module = Module(0.0)

    def make(self, batch: Batch, features: object) -> tuple[Made, ...]:
        return (Made(targets_of(batch), targets_of(batch), None),)


class EngineOfAModule(StudentEngine):
    def __init__(self, error: float) -> None:
        """Nothing of DeepSpeed is needed."""
        self.module, self.topology = Module(error).train(), groups.single_process()
        self.make_targets = TeacherOfFixedTargets().make


def targets_of(batch: Batch) -> torch.Tensor:
    return TARGETS[batch.sample_ids % len(TARGETS)]


def figures(batches: list[Batch], error: float) -> dict[str, float]:
    student = EngineOfAModule(error)
    found = HeldOutSet(batches, student, TeacherOfFixedTargets(), LossConfig(), ONE).figures()
    assert student.module.training
    return {name: found[name] for name in ("held_out_loss", "held_out_explained")}


def batches(*sizes: int) -> list[Batch]:
    return [tiny_models.batch("v1_vision", samples=size, seed=size) for size in sizes]


def test_a_perfect_prediction_explains_everything_and_an_error_is_what_it_costs() -> None:
    assert figures(batches(3, 2), 0.0) == pytest.approx({"held_out_loss": 0.0, "held_out_explained": 1.0})
    found = figures(batches(3, 2), 0.5)
    assert found["held_out_loss"] == pytest.approx(32 * 0.25 / 32**0.5)
    assert found["held_out_explained"] == pytest.approx(0.75, abs=0.05)


def test_batches_weigh_by_their_masked_positions() -> None:
    everything = torch.cat([masked_targets(targets_of(batch), batch) for batch in batches(3, 2)]).double()
    explained = 1 - 0.25 * everything.numel() / (everything - everything.mean(0)).square().sum().item()
    assert figures(batches(3, 2), 0.5)["held_out_explained"] == pytest.approx(explained)


def test_views_are_of_the_first_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all samples under four masks an evaluation took nearly twice as long."""
    monkeypatch.setattr("d2v_scale.evaluation.held_out.VIEWED", 5)
    student = EngineOfAModule(0.5)
    again = [batches(3, 2, 4)] * 3
    held_out = HeldOutSet(batches(3, 2, 4), student, TeacherOfFixedTargets(), LossConfig(), ONE, redrawn=again)
    found = held_out.figures()
    assert student.module.seen == [3, 2, 4, *[3, 2] * 3]
    assert found["held_out_explained"] == figures(batches(3, 2, 4), 0.5)["held_out_explained"]
    assert found["lidar"] == 0.0, "there are no blocks"


@pytest.mark.parametrize("visible_only", [False, True])
def test_the_masks_of_a_held_out_set_never_change(visible_only: bool, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    texts = documents(20)
    train(texts, tokenizer, vocab_size=300)
    samples = [{"__key__": f"{k}", "txt": text, "cls": k % 2} for k, text in enumerate(texts)]
    write_set(
        tmp_path, "test", "text", samples, per_shard=20, measure=TokenCounter(tokenizer), classes=["a", "b"],
        tokenizer=tokenizer,
    )  # fmt: skip
    model = ModelConfig(visible_only=visible_only, text=TextStem(vocab_size=301, mask_id=300, max_positions=32))
    masking = MaskingConfig(kind="random" if visible_only else "spans", prob=0.5, length=1, clones=1 + visible_only)
    data = DataConfig(text=TextData())

    def read() -> list[tuple[Batch, torch.Tensor]]:
        return list(LabelledSet(str(tmp_path / "test-*.tar"), "text", data, model, batch_size=8, masking=masking))

    for (batch, labels), (again, _) in zip(read(), read(), strict=True):
        assert torch.equal(batch.masked_rt, again.masked_rt)
        assert batch.masked_rt.any(dim=1).all()
        assert batch.clones == masking.clones
        assert labels.tolist() == [int(key) % 2 for key in batch.keys]
        if not visible_only:
            assert batch.student_inputs is not None
            assert (batch.student_inputs[batch.masked_rt] == 300).all()
