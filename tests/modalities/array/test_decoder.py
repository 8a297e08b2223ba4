"""Arrays from shards to batches: crops, padding, missing values, and what is refused in words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_shards import npy, npz

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.modalities.array.decoder import ArrayDecoder
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem
from d2v_scale.shards.reading import SampleFault, SampleStore
from d2v_scale.shards.shard_set import find_shards
from d2v_scale.shards.writing import write_set

TIME = ArrayAxis(patch=2, extent=8)
CROPPED = ArrayAxis(patch=2, extent=8, longer="crop")


def store_of(folder: Path, members: list[dict[str, Any]]) -> SampleStore:
    samples = [{"__key__": f"{number:04d}", **held} for number, held in enumerate(members)]
    write_set(folder, "train", "array", samples, per_shard=100)
    return SampleStore(find_shards(SourceConfig(shards=str(folder / "train-*.tar"))))


def rows_of(folder: Path, stem: ArrayStem, *members: np.ndarray | dict[str, Any], draw: float = 0.0) -> list[Any]:
    """The training rows of these members; of one that is lost, why."""
    decoder = ArrayDecoder(stem, "model.arrays.heart")
    store = store_of(folder, [held if isinstance(held, dict) else {"npy": npy(held)} for held in members])
    found: list[Any] = []
    for item in range(len(members)):
        try:
            found.append(decoder.training_row(store, 0, item, 0, np.full(decoder.draws, draw)).values)
        except SampleFault as fault:
            found.append(f"{fault.fault.key}: {fault.fault.reason}")
    return found


@pytest.mark.parametrize("dtype", ["f4", ">f8", "i2", "u1", "?", "f2"])
def test_arrays_of_any_number_type_are_read_as_they_are(dtype: str, tmp_path: Path) -> None:
    values = (np.arange(16).reshape(2, 8) % 3).astype(dtype)
    stem = ArrayStem(channels=2, axes={"time": TIME})
    rows = rows_of(tmp_path, stem, values, {"npz": npz(x=values)}, np.asfortranarray(values))
    for row in rows:
        assert row.dtype == np.float32
        assert np.array_equal(row, values.astype(np.float32))


def test_the_array_of_an_npz_is_chosen_by_its_key(tmp_path: Path) -> None:
    held = {"npz": npz(ecg=np.ones((1, 8)), eeg=np.zeros((1, 8)))}
    [row] = rows_of(tmp_path, ArrayStem(key="ecg", axes={"time": TIME}), held)
    assert row.sum() == 8
    [why] = rows_of(tmp_path, ArrayStem(axes={"time": TIME}), held)
    assert "holds 2 arrays (ecg, eeg): name one" in why
    [why] = rows_of(tmp_path, ArrayStem(key="eog", axes={"time": TIME}), held)
    assert "has no array 'eog': it holds ecg, eeg" in why


@pytest.mark.parametrize("draw", [0.0, 0.37, 0.9999999])
@pytest.mark.parametrize("fortran", [False, True])
def test_a_crop_is_the_same_whether_all_or_a_slice_of_the_member_is_read(
    draw: float, fortran: bool, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(2, 50, 9)).astype(np.float32)
    stem = ArrayStem(channels=2, axes={"time": CROPPED, "band": ArrayAxis(patch=3, extent=6, longer="crop")})
    stored = np.asfortranarray(values) if fortran else values
    sliced, whole = rows_of(tmp_path, stem, stored, {"npz": npz(x=stored)}, draw=draw)
    start, band = int(draw * 43), int(draw * 4)
    assert np.array_equal(sliced, values[:, start : start + 8, band : band + 6])
    assert np.array_equal(sliced, whole)


def test_a_crop_of_a_long_member_reads_its_slice_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(100_000, dtype=np.float32).reshape(1, -1)
    decoder = ArrayDecoder(ArrayStem(axes={"time": CROPPED}), "model.arrays.heart")
    store = store_of(tmp_path, [{"npy": npy(values)}, {"npy": npy(values[:, :8])}])
    read, pread = [], SampleStore.member

    def member(*arguments: Any) -> Any:
        extension, read_at, size = pread(*arguments)

        def counted(start: int, count: int) -> bytes:
            content = read_at(start, count)
            read.append(len(content))
            return content

        return extension, counted, size

    monkeypatch.setattr(SampleStore, "member", member)
    row = decoder.training_row(store, 0, 0, 0, np.array([0.5])).values
    assert np.array_equal(row, values[:, 49_996:50_004])
    assert sum(read) < 1000
    assert decoder.training_row(store, 0, 1, 0, np.array([0.5])).values.shape == (1, 8)


def test_evaluation_reads_the_middle(tmp_path: Path) -> None:
    decoder = ArrayDecoder(ArrayStem(axes={"time": CROPPED}), "model.arrays.heart")
    store = store_of(tmp_path, [{"npy": npy(np.arange(20.0)[None])}])
    assert decoder.evaluation_row(store.read(0, 0)).tolist() == [list(range(6, 14))]


def test_shorter_samples_are_padded_and_the_padding_is_marked() -> None:
    stem = ArrayStem(channels=2, axes={"time": TIME, "band": ArrayAxis(extent=3)})
    decoder = ArrayDecoder(stem, "model.arrays.heart")
    stacked = decoder.stack([np.ones((2, 8, 3), np.float32), np.ones((2, 5, 2), np.float32)])
    assert stacked.inputs.shape == (2, 2, 8, 3)
    assert stacked.inputs[1].sum() == 20
    assert stacked.valid is not None
    assert stacked.valid_lengths is not None
    assert stacked.valid[0].all()
    # Five steps are two patches and a half: three.
    assert stacked.valid[1].view(4, 3).int().tolist() == [[1, 1, 0]] * 3 + [[0, 0, 0]]
    assert stacked.valid_lengths.tolist() == [[4, 3], [3, 2]]
    assert decoder.stack([np.ones((2, 8, 3), np.float32)]).valid is None
    assert stacked.positions == 12


def test_no_patch_that_misses_a_value_is_seen_or_predicted(tmp_path: Path) -> None:
    stem = ArrayStem(channels=2, axes={"time": TIME}, missing="mask", normalise="channel")
    values = np.arange(16.0).reshape(2, 8)
    values[1, 3] = np.nan
    [row] = rows_of(tmp_path, stem, values)
    there = values[0]
    assert row[0] == pytest.approx((there - there.mean()) / there.std(), abs=1e-5)
    assert np.nanmean(row[1]) == pytest.approx(0, abs=1e-6)
    stacked = ArrayDecoder(stem, "model.arrays.heart").stack([row])
    assert stacked.missing == 1
    assert stacked.valid is not None
    assert stacked.valid.tolist() == [[True, False, True, True]]
    assert stacked.inputs[0, :, 2:4].abs().sum() == 0
    assert stacked.inputs.isfinite().all()


@pytest.mark.parametrize("normalise", ["sample", "channel"])
def test_values_in_a_small_unit_are_normalised_too(normalise: str, tmp_path: Path) -> None:
    """Microvolts stored in volts: a variance below what was added to it left values of 0.01."""
    stem = ArrayStem(channels=2, axes={"time": TIME}, normalise=normalise)  # type: ignore[arg-type]
    values = np.random.default_rng(0).standard_normal((2, 8))
    for unit in (1e-6, 1e-20, 1.0, 1e12):
        [row] = rows_of(tmp_path, stem, values * unit)
        over = None if normalise == "sample" else 1
        assert row.mean(axis=over) == pytest.approx(0, abs=1e-6)
        assert row.std(axis=over) == pytest.approx(1, rel=1e-5)


def test_a_channel_that_does_not_vary_becomes_zero(tmp_path: Path) -> None:
    stem = ArrayStem(channels=2, axes={"time": TIME}, normalise="channel")
    for constant in (0.0, 0.1, -12345.678, 1e-40, 3e38):
        values = np.arange(16.0).reshape(2, 8)
        values[1] = constant
        [row] = rows_of(tmp_path, stem, values)
        assert row[0].std() == pytest.approx(1)
        assert not row[1].any()


@pytest.mark.parametrize("visible_only", [False, True])
def test_masks_hide_what_is_there_and_count_nothing_else(visible_only: bool, tmp_path: Path) -> None:
    """Of the loader's batches: padding and missing patches are neither predicted nor, in 1.0, masked."""
    rng = np.random.default_rng(0)
    members = []
    for number in range(32):
        values = rng.normal(size=(2, int(rng.integers(3, 9)), 6)).astype(np.float32)
        if number % 2:
            values[0, 0, 0] = np.nan
        members.append({"npy": npy(values)})
    store_of(tmp_path, members)
    stem = ArrayStem(channels=2, axes={"time": TIME, "band": ArrayAxis(patch=2, extent=6)}, missing="mask")
    model = ModelConfig(visible_only=visible_only, arrays={"heart": stem})
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path / "train-*.tar"), modality="heart")], workers=0)
    for kind in ("random", "blocks", "block1d"):
        masks = MaskingConfig(kind=kind, prob=0.6, length=2, clones=2)  # type: ignore[arg-type]
        loader = StepLoader(data, model, masks, seed=1, global_batch_size=8)
        for _ in range(4):
            [batch] = next(loader)
            assert batch.valid is not None
            assert batch.real_bt is not None
            real_rt = batch.real_bt.repeat_interleave(2, dim=0)
            if visible_only:
                assert batch.layout.visible_rs is not None
                assert (~batch.masked_rt & real_rt).any(dim=1).all()
            else:
                assert not (batch.masked_rt & ~real_rt).any()
            predicted = torch.zeros_like(batch.masked_rt).flatten()
            predicted[batch.layout.predicted_n] = True
            assert torch.equal(predicted.view_as(real_rt), batch.masked_rt & real_rt)
            assert batch.layout.predictions == int((batch.masked_rt & real_rt).sum())
        assert loader.take_counts()["heart"].missing == 16


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (np.zeros((3, 8)), r"has the shape (3, 8), but model.arrays.heart has 2 channels and the axes time"),
        (np.zeros((2, 8, 2)), r"has the shape (2, 8, 2), but model.arrays.heart has 2 channels and the axes time"),
        (np.zeros((2, 9)), "has 9 steps along time, more than model.arrays.heart.axes.time.extent 8"),
        (np.zeros((2, 0)), "has the shape (2, 0), in which there is nothing"),
        (np.array([[{}] * 8] * 2, dtype=object), "holds pickled objects, which are never loaded"),
        (np.zeros((2, 8), complex), "which are no real numbers"),
        (np.full((2, 8), np.nan), "holds nothing but NaN"),
        (np.array([[np.nan] + [0.0] * 7] * 2), "holds 2 NaN of 16 values (model.arrays.heart.missing is refuse)"),
        (np.full((2, 8), np.inf), "holds values that are infinite"),
        ({"npy": npy(np.zeros((2, 8)))[:-1]}, "is cut off"),
        ({"txt": "nothing"}, "has no .npy, .npz"),
    ],
)
def test_a_sample_that_the_stem_does_not_read_is_lost_by_name_and_the_others_are_not(
    held: np.ndarray | dict[str, Any], said: str, tmp_path: Path
) -> None:
    why, row = rows_of(tmp_path, ArrayStem(channels=2, axes={"time": TIME}), held, np.zeros((2, 8)))
    assert said in why
    assert why.startswith("0000: ")
    assert row.shape == (2, 8)


def test_a_nan_in_every_patch_leaves_nothing_to_see(tmp_path: Path) -> None:
    values = np.zeros((1, 8))
    values[0, ::2] = np.nan
    [why] = rows_of(tmp_path, ArrayStem(axes={"time": TIME}, missing="mask"), values)
    assert "has a NaN in every patch" in why


def test_values_are_transformed_before_they_are_normalised(tmp_path: Path) -> None:
    values = np.array([[0.0, 1.0, np.e, 1.0, 1.0, 1.0, 1.0, 1.0]])
    logs = np.log(np.maximum(values, 1e-3))
    [row] = rows_of(tmp_path, ArrayStem(axes={"time": TIME}, transform="log", log_floor=1e-3), values)
    assert row == pytest.approx(logs, abs=1e-6)
    stem = ArrayStem(axes={"time": TIME}, transform="log", log_floor=1e-3, normalise="moments", mean=[2.0], std=[4.0])
    [row] = rows_of(tmp_path, stem, values)
    assert row == pytest.approx((logs - 2) / 4, abs=1e-6)
    stem = ArrayStem(axes={"time": TIME}, transform="log", log_floor=1e-3, normalise="sample")
    row, why = rows_of(tmp_path, stem, values, -values)
    assert row == pytest.approx((logs - logs.mean()) / logs.std(), abs=1e-4)
    assert "holds -2.71828, which has no logarithm (model.arrays.heart.transform)" in why


def test_the_values_of_a_patch_are_those_at_its_place() -> None:
    stem = ArrayStem(channels=2, axes={"a": ArrayAxis(patch=2, extent=4), "b": ArrayAxis(patch=3, extent=6)})
    model = ModelConfig(arrays={"heart": stem})
    [says] = modalities.stems(model)
    inputs = torch.arange(2.0 * 4 * 6).view(1, 2, 4, 6)
    batch = type("Inputs", (), {"inputs": inputs})()
    values_btv = says.input_values(batch)
    assert values_btv.shape == (1, 4, 12)
    assert values_btv[0, 1].view(2, 3, 2)[:, :, 0].tolist() == inputs[0, 0, :2, 3:].tolist()
