"""Encoders that were trained on paired samples: any subset of parts, and exports of their stems."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from exported_models import checkpoint_of_recipe
from paired_shards import paired_samples, write_pairs, write_recipe

import d2v_scale
from d2v_scale import command_line
from d2v_scale.commands import export, extract, probe
from d2v_scale.errors import DataError

WAVE = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
IMAGE = np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, so that the vectors of stems are far from zero."""
    root = tmp_path_factory.mktemp("paired")
    index = write_pairs(root / "shards", paired_samples(20))
    recipe, _ = command_line.parse(["--recipe", str(write_recipe(root / "pairs.yaml", index))])
    return checkpoint_of_recipe(recipe, root)


def test_an_encoder_of_pairs_embeds_any_subset_of_parts(run: Path) -> None:
    encoder = d2v_scale.load_encoder(run)
    images, waves, texts = [IMAGE, IMAGE[::-1].copy()], [WAVE, WAVE], ["the quick fox", "a lazy dog"]
    whole = encoder.embed({"vision": images, "speech": waves, "text": texts})
    assert whole.shape == (2, 32)
    assert not torch.equal(whole[0], whole[1])
    two = encoder.embed({"text": texts, "vision": images})
    lacking = encoder.embed({"vision": images, "speech": [None, None], "text": texts})
    torch.testing.assert_close(two, lacking, rtol=1e-4, atol=1e-5)
    alone = encoder.embed({"vision": images})
    torch.testing.assert_close(alone, encoder.embed(images, stem="vision"), rtol=1e-5, atol=1e-6)
    mixed = encoder.embed({"vision": [None, images[1]], "text": [texts[0], None]})
    torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], encoder.embed({"text": texts[:1]})[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "parts"), [("pairs", ("png", "flac", "txt")), ("text+vision", ("png", "txt"))])
def test_samples_of_several_parts_are_extracted_as_they_are_embedded(
    run: Path, tmp_path: Path, name: str, parts: tuple[str, ...], world_of_one: None
) -> None:
    """By the name of their source, or of some of its stems; a part that is not there is left out."""
    samples = paired_samples(20)
    made = [str(run), str(run.parent / "shards"), str(tmp_path / "out"), "--modality", name, "--batch_size", "1"]
    assert extract.main(made) == 0
    [file] = (tmp_path / "out").glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    assert table["key"].to_pylist() == [sample["__key__"] for sample in samples]
    stems = {"png": "vision", "flac": "speech", "txt": "text"}
    given = {stems[part]: [sample.get(part) for sample in samples] for part in parts}
    encoder = d2v_scale.load_encoder(run)
    expected = encoder.embed(given, batch_size=1)
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), expected, rtol=1e-4, atol=1e-5)


def test_samples_of_several_parts_are_probed_by_the_name_of_their_source(
    run: Path, tmp_path: Path, world_of_one: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--data", str(run.parent / "shards"), "--test", str(run.parent / "shards")]
    out = tmp_path / "result.json"
    assert probe.main([str(run), *shards, "--modality", "pairs", "--k", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["train_samples"], result["test_lost"]) == (20, 0)
    assert result["accuracy"]["layer 2"] == 1  # each is its own neighbour
    for arguments in ([], ["--modality", "smell"], ["--modality", "vision+smell"]):
        assert probe.main([str(run), *shards, *arguments]) == 2
        assert "'pairs' (vision with speech with text)" in capsys.readouterr().err
    assert probe.main([str(run), *shards, "--modality", "pairs", "--task", "ctc"]) == 2
    assert "stems for vision, speech, text" in capsys.readouterr().err


def test_parts_that_are_longer_than_what_is_read_were_cut_without_a_word(run: Path) -> None:
    encoder = d2v_scale.load_encoder(run)
    texts = ["the quick fox", "a lazy dog jumps " * 30, None]
    with pytest.warns(UserWarning, match=r"1 of 2 samples are longer .* \(31 tokens\)") as warned:
        encoder.embed({"vision": [IMAGE] * 3, "text": texts})
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"smell": [IMAGE]}, "samples names smell"),
        ({}, "samples names no stem"),
        ({"vision": [IMAGE], "text": ["a", "b"]}, "1 of vision, 2 of text"),
        ({"vision": []}, "0 of vision"),
        ({"vision": [None]}, "Sample 0 has no part"),
        ({"text": "abc"}, "samples has a str for text"),
    ],
)
def test_what_is_no_paired_sample_is_said(run: Path, samples: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        d2v_scale.load_encoder(run).embed(samples)


def test_exported_stems_compute_what_they_do_among_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vector that tells the stem apart is in a bias of the export; all stems at once need our own format."""
    encoder = d2v_scale.load_encoder(run)
    for stem, samples in {"vision": [IMAGE], "speech": [WAVE], "text": [np.arange(4, 12)]}.items():
        assert export.main([str(run), str(tmp_path / stem), "--to", "hf", "--modality", stem]) == 0, capsys.readouterr()
        again = d2v_scale.load_encoder(tmp_path / stem)
        assert not [name for name, _ in again._frozen.model.named_parameters() if name.endswith("features.modality")]
        torch.testing.assert_close(again.embed(samples), encoder.embed(samples, stem=stem), rtol=1e-4, atol=1e-5)
    vector = encoder._frozen.model.stems["vision"].features.modality
    assert float(vector.abs().max()) > 1e-4, "nothing was folded"
    assert export.main([str(run), str(tmp_path / "all"), "--to", "onnx", "--modality", "pairs"]) == 2
    assert "several inputs" in capsys.readouterr().err
    assert export.main([str(run), str(tmp_path / "all"), "--to", "safetensors"]) == 0
    both = {"vision": [IMAGE], "text": ["the fox"]}
    torch.testing.assert_close(d2v_scale.load_encoder(tmp_path / "all").embed(both), encoder.embed(both))
