"""Masks against statistics recorded from the reference (2,000 rows each; tests/golden/masks.json)."""

import json
from pathlib import Path

import numpy as np
import pytest

from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.data2vec.masking import collate

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "masks.json").read_text())
PADDED = [249, 249, 220, 200, 180, 160, 140, 120]
SPEECH = MaskingConfig(kind="spans", prob=0.65, length=10)
TEXT = MaskingConfig(kind="spans", prob=0.35, length=4, starts="anywhere")


def block(dims: int, prob: float, length: int, adjust: float, inverse: bool = False) -> MaskingConfig:
    kind = "block1d" if dims == 1 else "block2d"
    return MaskingConfig(kind=kind, prob=prob, length=length, adjust=adjust, inverse=inverse)  # type: ignore[arg-type]


def blockwise(count: int, smallest: int = 16) -> MaskingConfig:
    return MaskingConfig(kind="blockwise", target_count=count, min_block=smallest)


def random(prob: float) -> MaskingConfig:
    return MaskingConfig(kind="random", prob=prob)


CASES = {
    "v1_audio/T249_bsz1": SPEECH,
    "v1_audio/T499_bsz1": SPEECH,
    "v1_audio/T779_bsz1": SPEECH,
    "v1_audio/T249_bsz8_same": SPEECH,
    "v1_audio/T249_bsz8_padded_same": SPEECH,
    "v1_audio/T249_bsz8_padded_notsame": SPEECH,
    "v1_text/MaskTokensDataset_sz256": TEXT,
    "v1_text/MaskTokensDataset_sz512": TEXT,
    "v1_vision/beit_14x14_n120_min16_max196": blockwise(120),
    "v1_vision/beit_14x14_n75_min16_max196": blockwise(75),
    "v1_vision/beit_8x8_n39_min6_max64": blockwise(39, 6),
    "v2_audio/block1d_T249_base": block(1, 0.5, 5, 0.05),
    "v2_audio/block1d_T249_large": block(1, 0.55, 5, 0.1),
    "v2_audio/block1d_T499_base": block(1, 0.5, 5, 0.05),
    "v2_audio/block1d_T499_large": block(1, 0.55, 5, 0.1),
    "v2_1d/T249_inverse_p0.8_len3_adj0.07": block(1, 0.8, 3, 0.07, inverse=True),
    "v2_1d/T249_inverse_p0.8_len5_adj0.07": block(1, 0.8, 5, 0.07, inverse=True),
    "v2_1d/T249_p0.5_len5_noadj": block(1, 0.5, 5, 0.0),
    "v2_1d/T249_p0.5_len4_adj0.05(even length)": block(1, 0.5, 4, 0.05),
    "v2_image/base_196_p0.8_len3_adj0.07_inv": block(2, 0.8, 3, 0.07, inverse=True),
    "v2_image/large_196_p0.75_len3_adj0.1_inv": block(2, 0.75, 3, 0.1, inverse=True),
    "v2_image/huge14_256_p0.75_len3_adj0.1_inv": block(2, 0.75, 3, 0.1, inverse=True),
    "v2_image/196_p0.8_len5_adj0.07_inv": block(2, 0.8, 5, 0.07, inverse=True),
    "v2_image/196_p0.8_len3_adj0_inv": block(2, 0.8, 3, 0.0, inverse=True),
    "v2_image/196_p0.6_len3_adj0.1_noninv": block(2, 0.6, 3, 0.1),
    "v2_image/64_p0.8_len3_adj0.07_inv (golden grid)": block(2, 0.8, 3, 0.07, inverse=True),
    "v2_text/random_masking_L512_p0.48": random(0.48),
    "v2_text/random_masking_L256_p0.48": random(0.48),
    "v2_text/random_masking_L512_p0.5": random(0.5),
}


def masks_and_lengths(name: str, config: MaskingConfig) -> tuple[np.ndarray, np.ndarray]:
    recorded = RECORDED[name]
    rows, length = recorded["rows"], recorded["length"]
    in_grid = config.kind in ("blockwise", "block2d")
    where: dict = {"grid": (round(length**0.5),) * 2} if in_grid else {"length": length}
    batch = 8 if "_bsz8" in name else rows
    lengths = np.resize(PADDED if "padded" in name else [length], batch)
    compat = CompatConfig(equalize_masks=name.endswith("_same"))
    drawn = [
        collate(config, sample_ids=range(batch), valid_lengths=lengths, seed=1, step=step, compat=compat, **where)
        for step in range(rows // batch)
    ]
    return np.concatenate([m.masked_rt for m in drawn]), np.tile(lengths, rows // batch)


def run_lengths(lines_nt: np.ndarray, masks: int, value: bool) -> np.ndarray:
    """How many runs of each length every mask has, (masks, longest + 1); a mask is one line or several."""
    lines, longest = lines_nt.shape
    edges = np.zeros((lines, longest + 2), dtype=np.int8)
    edges[:, 1:-1] = lines_nt == value
    steps = np.diff(edges, axis=1)
    line, start = np.nonzero(steps == 1)
    runs = np.nonzero(steps == -1)[1] - start
    found = np.zeros((masks, longest + 1), dtype=np.int64)
    np.add.at(found, (line // (lines // masks), runs), 1)
    return found


def assert_same_histogram(per_mask: np.ndarray, recorded: dict[str, int]) -> None:
    """Totals of both within 4 standard errors; the error is taken over masks, since runs of one mask come in groups."""
    masks, bins = per_mask.shape
    theirs = np.zeros(bins)
    for value, total in recorded.items():
        theirs[int(value)] = total
    ours = per_mask.sum(0)
    # Rare values are pooled with their neighbours.
    edges = np.unique(np.minimum((np.cumsum(ours + theirs) - (ours + theirs)) // 60, 10**9), return_index=True)[1]
    pooled = np.add.reduceat(per_mask, edges, axis=1)
    error = np.sqrt(2 * masks * pooled.var(0) + 1)
    deviation = np.abs(pooled.sum(0) - np.add.reduceat(theirs, edges)) / error
    assert deviation.max() <= 4, f"{deviation.max():.1f} standard errors"
    assert np.sqrt((deviation**2).mean()) < 1.6


@pytest.mark.parametrize("name", CASES)
def test_masks_have_the_recorded_statistics(name: str) -> None:
    assert_recorded_statistics(name, CASES[name])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("v1_audio/T249_bsz1", MaskingConfig(kind="spans", prob=0.65, length=10, starts="anywhere")),
        ("v1_text/MaskTokensDataset_sz512", MaskingConfig(kind="spans", prob=0.35, length=4)),
        ("v2_audio/block1d_T249_base", block(1, 0.5, 5, 0.0)),
        ("v2_image/base_196_p0.8_len3_adj0.07_inv", block(2, 0.8, 3, 0.0, inverse=True)),
        ("v1_vision/beit_14x14_n120_min16_max196", blockwise(120, 8)),
    ],
)
def test_slightly_different_masking_is_noticed(name: str, wrong: MaskingConfig) -> None:
    with pytest.raises(AssertionError):
        assert_recorded_statistics(name, wrong)


def assert_recorded_statistics(name: str, config: MaskingConfig) -> None:
    recorded = RECORDED[name]
    masked_rt, lengths_r = masks_and_lengths(name, config)
    rows = len(masked_rt)
    fraction_r = masked_rt.sum(1) / lengths_r
    grouped = 8 if name.endswith("_same") else 1  # equalised rows of one batch are not independent
    error = recorded["std_masked_fraction"] * (2 * grouped / rows) ** 0.5
    assert abs(fraction_r.mean() - recorded["mean_masked_fraction"]) <= 4 * error + 1e-5

    if "padded" not in name and grouped == 1:
        counts = np.zeros((rows, masked_rt.shape[1] + 1), dtype=np.int64)
        counts[np.arange(rows), masked_rt.sum(1)] = 1
        assert_same_histogram(counts, recorded["masked_count_hist"])

    position_t = np.array(recorded["position_masked_prob"]).reshape(-1)
    pooled_t = (masked_rt.mean(0) + position_t) / 2
    # Hundreds of positions: 4 standard errors for each, with room for one beyond.
    limit_t = 4 * np.sqrt(2 * pooled_t * (1 - pooled_t) / rows) + 1e-4
    deviation_t = np.abs(masked_rt.mean(0) - position_t)
    assert (deviation_t > limit_t).sum() <= 1
    assert (deviation_t <= 1.25 * limit_t).all()

    if "grid" in recorded:
        side = round(masked_rt.shape[1] ** 0.5)
        grids = masked_rt.reshape(rows, side, side)
        lines, columns = grids.reshape(-1, side), grids.transpose(0, 2, 1).reshape(-1, side)
        assert_same_histogram(run_lengths(lines, rows, True), recorded["horizontal_masked_run_hist"])
        assert_same_histogram(run_lengths(columns, rows, True), recorded["vertical_masked_run_hist"])
    else:
        assert_same_histogram(run_lengths(masked_rt, rows // grouped, True), recorded["masked_run_length_hist"])
        if "padded" not in name:
            assert_same_histogram(run_lengths(masked_rt, rows // grouped, False), recorded["unmasked_run_length_hist"])


@pytest.mark.parametrize(
    ("config", "side", "count"),
    [
        (block(2, 0.8, 3, 0.07, inverse=True), 14, 157),
        (block(2, 0.75, 3, 0.1, inverse=True), 14, 147),
        (block(2, 0.75, 3, 0.1, inverse=True), 16, 192),
    ],
)
def test_acceptance_3_exact_counts_of_published_vision_masks(config: MaskingConfig, side: int, count: int) -> None:
    masks = collate(config, grid=(side, side), sample_ids=range(200), seed=0, step=0)
    assert set(masks.masked_rt.sum(1).tolist()) == {count}


@pytest.mark.parametrize(
    ("config", "length", "count"),
    [
        (block(1, 0.5, 5, 0.05), 780, 390),
        (block(1, 0.55, 5, 0.1), 999, 549),
        (random(0.48), 512, 246),
        (random(0.42), 512, 216),
    ],
)
def test_acceptance_3_exact_counts_of_published_speech_and_text_masks(
    config: MaskingConfig, length: int, count: int
) -> None:
    masks = collate(config, length=length, sample_ids=range(200), seed=0, step=0)
    assert set(masks.masked_rt.sum(1).tolist()) == {count}
