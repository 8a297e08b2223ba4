from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_scale.batch import Batch, Layout
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.data2vec.masking import collate
from d2v_scale.model.stem_config import Kind
from d2v_scale.plots import gallery as gallery_module
from d2v_scale.plots.gallery import Gallery, draw_gallery, masked
from d2v_scale.plots.gallery import main as gallery_program


def labelled(modality: str) -> tuple[Batch, torch.Tensor | None]:
    """Six samples with 16 positions each, the last three shorter where the modality has lengths."""
    nothing = torch.zeros(6, 16, dtype=torch.bool)
    valid_bt = torch.arange(16)[None] < torch.tensor([16, 16, 16, 9, 9, 9])[:, None]
    if modality == "vision":
        batch = Batch(
            modality="vision",
            inputs=torch.rand(6, 3, 8, 8),
            valid=None,
            masked_rt=nothing,
            sample_ids=torch.arange(6),
            grid=(4, 4),
        )
        return batch, None
    if modality == "speech":
        inputs, valid = torch.randn(6, 16 * 320), valid_bt.repeat_interleave(320, dim=1)
    else:
        inputs, valid = torch.randint(5, 90, (6, 16)), valid_bt
    batch = Batch(modality=modality, inputs=inputs, valid=valid, masked_rt=nothing, sample_ids=torch.arange(6))  # type: ignore[arg-type]
    return batch, valid_bt


@pytest.mark.parametrize(
    ("modality", "masks", "own"),
    [
        ("vision", MaskingConfig(kind="block2d", prob=0.8, length=2, inverse=True, clones=3), "pca"),
        ("speech", MaskingConfig(kind="spans", prob=0.5, length=3), "similarity"),
        ("text", MaskingConfig(kind="bert", prob=0.3), None),
    ],
)
def test_every_modality_has_its_pictures(tmp_path: Path, modality: Kind, masks: MaskingConfig, own: str | None) -> None:
    batch, valid_bt = labelled(modality)
    states = torch.randn(3, 6, 8)
    gallery = Gallery(
        kind=modality,
        batch=batch,
        labels=list("ababab") if modality == "vision" else [""] * 6,
        valid_bt=valid_bt,
        teacher_lnd=states,
        first_btd=torch.randn(6, 16, 8),
        masks=masks,
        seed=1,
        step=5,
        student_lnd=states + 1 if modality == "vision" else None,
        suffix="_text" if modality == "text" else "",
    )
    gallery.save(tmp_path / "saved.pt")
    paths = draw_gallery(tmp_path, Gallery.load(tmp_path / "saved.pt"))
    layers = {"layers_teacher_teacher"} | ({"layers_teacher_student"} if modality == "vision" else set())
    wanted = {"masks", "neighbours", *layers} | ({own} if own else set())
    assert {path.name for path in paths} == {f"{name}{gallery.suffix}.png" for name in wanted}
    assert all(path.stat().st_size > 5000 for path in paths)


def test_pictures_of_a_student_are_not_called_the_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, _ = labelled("vision")
    names: list[dict[str, str]] = []
    monkeypatch.setattr(gallery_module, "plot_cka", lambda *given, **named: names.append(named) or given[2])
    gallery = Gallery(
        kind="vision",
        batch=batch,
        labels=[""] * 6,
        valid_bt=None,
        teacher_lnd=torch.randn(3, 6, 8),
        first_btd=torch.randn(6, 16, 8),
        masks=MaskingConfig(kind="random"),
        seed=1,
        step=5,
        encoder="student",
    )
    gallery.save(tmp_path / "saved.pt")
    paths = draw_gallery(tmp_path, Gallery.load(tmp_path / "saved.pt"))
    assert paths[-1].stem == "layers_student_student"
    assert names == [{"row_name": "student", "column_name": "student"}]


def test_the_masks_shown_are_those_of_training() -> None:
    batch, valid_bt = labelled("speech")
    masks = MaskingConfig(kind="spans", prob=0.5, length=3)
    shown = masked(batch, valid_bt, masks, seed=1, step=5).masked_rt
    assert torch.equal(shown, masked(batch, valid_bt, masks, seed=1, step=5).masked_rt)
    assert not torch.equal(shown, masked(batch, valid_bt, masks, seed=1, step=6).masked_rt)
    assert valid_bt is not None
    assert not (shown & ~valid_bt).any()


def test_masks_over_three_axes_end_where_a_sample_does_along_each() -> None:
    """Extents were counted as positions of a line, which masks of blocks refuse of a grid."""
    places = torch.zeros(2, 2, 4, 5, dtype=torch.bool)
    places[0] = True
    places[1, :, :3, :2] = True
    batch = Batch(
        modality="vision",
        inputs=torch.zeros(2, 1),
        valid=None,
        masked_rt=torch.zeros(2, 40, dtype=torch.bool),
        sample_ids=torch.arange(2),
        grid=(2, 4, 5),
    )
    masks = MaskingConfig(kind="blocks", prob=0.5, length=2, clones=3)
    shown = masked(batch, places.flatten(1), masks, seed=1, step=5, equal_counts=False).masked_rt
    real_rt = places.flatten(1).repeat_interleave(3, dim=0)
    assert not (shown & ~real_rt).any()
    assert shown.sum(dim=1).tolist() == [20] * 3 + [6] * 3


def test_masks_shown_of_missing_values_are_those_of_training() -> None:
    """Where a value is missing is no matter of how far a sample reaches: masks were drawn as if it were there."""
    real_bt = torch.ones(3, 24, dtype=torch.bool)
    real_bt[0, 3:9] = False
    real_bt[1, 0] = False
    batch = Batch(
        modality="eeg",
        inputs=torch.zeros(3, 1, 24),
        valid=real_bt,
        masked_rt=torch.zeros(3, 24, dtype=torch.bool),
        sample_ids=torch.arange(3),
        real_bt=real_bt,
    )
    masks = MaskingConfig(kind="blocks", prob=0.5, length=3, clones=2)
    shown = masked(batch, real_bt, masks, seed=1, step=5)
    trained = collate(
        masks,
        length=24,
        sample_ids=np.arange(3),
        valid_lengths=np.array([24, 24, 24]),
        seed=1,
        step=5,
        equal_counts=True,
        real_bt=real_bt.numpy(),
    )
    assert torch.equal(shown.masked_rt, torch.from_numpy(trained.masked_rt))
    predicted = shown.layout.tensors
    wanted = Layout.of(torch.from_numpy(trained.masked_rt), real_bt).tensors
    assert predicted.keys() == wanted.keys()
    assert all(torch.equal(predicted[name], wanted[name]) for name in wanted)


def test_one_process_draws_all_stems_whatever_becomes_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stem had a process of its own, which imported everything again."""
    batch, valid_bt = labelled("text")
    states, masks = torch.randn(3, 6, 8), MaskingConfig(kind="bert", prob=0.3)
    facts = {"labels": [""] * 6, "valid_bt": valid_bt, "teacher_lnd": states, "first_btd": torch.randn(6, 16, 8)}
    damaged, saved = tmp_path / ".gallery-1_vision.pt", tmp_path / ".gallery-1_text.pt"
    damaged.write_bytes(b"no gallery")
    Gallery(kind="text", batch=batch, masks=masks, seed=1, step=1, suffix="_text", **facts).save(saved)  # type: ignore[arg-type]
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path), str(damaged), str(saved)])
    monkeypatch.setattr("os.nice", lambda _: 0)
    assert gallery_program() == 1
    assert "Traceback" in capsys.readouterr().err
    assert (tmp_path / "plots" / "masks_text.png").is_file()
    assert "masks_text" in (tmp_path / "mlflow_events.jsonl").read_text()
    assert not damaged.exists()
    assert not saved.exists()
