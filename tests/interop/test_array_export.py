"""Arrays as Hugging Face models: processor and encoder together give what `load_encoder` gives of the same arrays."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import checkpoint_of, checkpoint_of_recipe, tool, tuned
from host_models import load

import d2v_scale
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.predictor import TaskPredictor
from d2v_scale.interop import feature_extraction_data2vec2_array, huggingface_array
from d2v_scale.modalities.array import log_mel
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem
from d2v_scale.recipe import Recipe

warnings.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def recipe_of(stem: ArrayStem, *, version: int, **backbone: Any) -> Recipe:
    widths = {**(tiny_models.PRE if version == 1 else tiny_models.POST), **backbone}
    model = ModelConfig(
        visible_only=version == 2,
        arrays={"own": stem},
        backbone=Backbone(**widths),
        predictor=tiny_models.decoder("mlp" if version == 1 else "conv1d"),
        init="beit" if version == 1 else "default",
    )
    return Recipe(name="own", model=model, objective=ObjectiveConfig(target=tiny_models.TAPS))


def axes(**given: tuple[int, int]) -> dict[str, ArrayAxis]:
    return {name: ArrayAxis(patch=patch, extent=extent) for name, (patch, extent) in given.items()}


# Names of axes are in no alphabetical order, and configurations sort their keys.
VOLUMES = axes(t=(2, 4), z=(2, 4), a=(1, 3), m=(2, 6))
CASES: dict[str, tuple[Recipe, list[tuple[int, ...]], np.dtype[Any] | type, float]] = {
    # recipe, shapes, type, share of NaN
    "1.0 along one axis, learned, cropped": (
        recipe_of(
            ArrayStem(
                channels=2,
                axes={"time": ArrayAxis(patch=4, extent=40, longer="crop")},
                positions="learned",
                normalise="sample",
            ),
            version=1,
        ),
        [(2, 40), (2, 57), (2, 9), (2, 1)],
        np.float64,
        0.0,
    ),
    "1.0 post-norm, two axes, tokens": (
        recipe_of(
            ArrayStem(channels=3, axes=axes(z=(2, 8), b=(3, 12)), extra_tokens=2, normalise="channel", missing="mask"),
            version=1,
            norm_first=False,
            key_bias=True,
            layer_scale=0.0,
            final_norm=False,
        ),
        [(3, 8, 12), (3, 3, 12), (3, 8, 5)],
        np.float32,
        0.02,
    ),
    "2.0 along one axis, moments": (
        recipe_of(
            ArrayStem(channels=2, axes=axes(time=(4, 40)), normalise="moments", mean=[100.0, 3.0], std=[50.0, 2.0]),
            version=2,
            prenet_depth=1,
        ),
        [(2, 40), (2, 23)],
        np.dtype(">i2"),
        0.0,
    ),
    "2.0 along three axes, logarithm, NaN": (
        recipe_of(
            ArrayStem(
                channels=1,
                axes=axes(w=(3, 9), h=(2, 6), d=(2, 6)),
                transform="log",
                normalise="sample",
                missing="mask",
                extra_tokens=1,
            ),
            version=2,
        ),
        [(1, 9, 6, 6), (1, 5, 6, 3), (1, 9, 1, 6)],
        np.float16,
        0.01,
    ),
    "2.0 along four axes, pre-norm with layer scale": (
        recipe_of(ArrayStem(channels=2, axes=VOLUMES, missing="mask"), version=2, **tiny_models.PRE),
        [(2, 4, 4, 3, 6), (2, 3, 2, 1, 5)],
        np.float32,
        0.02,
    ),
    "2.0 of waveforms as log-mel": (
        recipe_of(
            ArrayStem(
                axes=axes(band=(4, 16)) | {"time": ArrayAxis(patch=4, extent=64, longer="crop")},
                transform="log_mel",
                log_mel=LogMel(hop_ms=5.0, window="povey", high_hz=7000.0),
                normalise="sample",
                extra_tokens=1,
            ),
            version=2,
        ),
        [(9000,), (400,), (16_000,)],
        np.float32,
        0.0,
    ),
    "2.0 bytes in a width that axes cannot share": (
        recipe_of(ArrayStem(axes=axes(x=(2, 8), y=(2, 6), c=(1, 3))), version=2, width=40),
        [(1, 8, 6, 3), (1, 7, 6, 2)],
        np.uint8,
        0.0,
    ),
}


def arrays_of(case: str) -> list[np.ndarray]:
    _, shapes, dtype, lacking = CASES[case]
    generator = np.random.default_rng(0)
    found = []
    for shape in shapes:
        values = generator.uniform(0.1, 90.0, shape)
        values[generator.random(shape) < lacking] = np.nan
        found.append(values.astype(dtype))
    return found


@pytest.mark.parametrize("case", CASES)
def test_processor_and_model_give_what_the_encoder_gives_alone_and_in_a_batch(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, arrays = CASES[case][0], tmp_path / "hf", arrays_of(case)
    run = checkpoint_of_recipe(recipe, tmp_path)
    assert tool("export").main([str(run), str(out)]) == 0
    assert "PASS" in capsys.readouterr().out
    from transformers import AutoFeatureExtractor, AutoProcessor

    processor = AutoFeatureExtractor.from_pretrained(out, trust_remote_code=True)
    # Written again by transformers, which sorts what is in it.
    processor.save_pretrained(tmp_path / "again")
    load("AutoModel", out).save_pretrained(tmp_path / "again")
    again = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    model = load("AutoModel", tmp_path / "again")
    given = again(arrays, return_tensors="pt")
    encoder = d2v_scale.load_encoder(run, device="cpu")
    states, pooled = encoder.layers(arrays), encoder.embed(arrays)
    tokens, before = model.config.extra_tokens, recipe.model.of("own").backbone.prenet_depth + 1
    with torch.no_grad():
        whole = model(**given, output_hidden_states=True)
        eager = load("AutoModel", out, attn_implementation="eager")(**given)
    assert torch.allclose(whole.pooler_output, pooled, atol=1e-5)
    assert torch.allclose(eager.last_hidden_state, whole.last_hidden_state, atol=1e-5)
    for k, array in enumerate(arrays):
        real = given["attention_mask"][k].bool()
        theirs = torch.stack([layer[k, tokens:][real] for layer in whole.hidden_states[before:]])
        assert theirs.shape == states[k].shape
        assert torch.allclose(theirs, states[k], atol=1e-5)
        alone = processor(array, return_tensors="pt")
        assert torch.equal(alone["values"][0], given["values"][k])
        with torch.no_grad():
            assert torch.allclose(model(**alone).last_hidden_state[0], whole.last_hidden_state[k], atol=1e-5)
    # Of the values, ours and theirs are the same bits; and an exported folder is an encoder, too.
    [batch] = encoder._batches(arrays, None, 32)
    assert torch.equal(batch.inputs, given["values"])
    assert torch.equal(d2v_scale.load_encoder(out, device="cpu").embed(arrays), pooled)


@pytest.mark.parametrize(("name", "kind"), zip(tiny_models.ARRAYS, ("classify", "classify", "regress"), strict=True))
def test_a_fine_tuned_model_of_arrays_gives_our_logits(name: str, kind: str, tmp_path: Path) -> None:
    task = TaskConfig(classes=3) if kind == "classify" else TaskConfig(kind="regress")
    run, out = tuned(name, task, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out)]) == 0
    batch = tiny_models.batch(name, padded=True)
    ours, again = TaskPredictor.load(run), TaskPredictor.load(out)
    assert torch.equal(ours.logits(batch), again.logits(batch))
    model = load("AutoModelForSequenceClassification", out)
    assert batch.valid is not None
    with torch.no_grad():
        output = model(batch.inputs, batch.valid, labels=torch.tensor([0, 2, 1]))
    assert torch.allclose(output.logits, ours.logits(batch), atol=1e-5)
    assert bool(output.loss.isfinite())
    if kind == "classify":
        assert model.config.id2label == {0: "ant", 1: "bee", 2: "cow"}


def test_an_encoder_of_arrays_is_fine_tuned_and_computes_in_half_precision(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_series", tmp_path)), str(out)]) == 0
    model = load("AutoModelForSequenceClassification", out, num_labels=3).train()
    model.gradient_checkpointing_enable()
    batch = tiny_models.batch("v1_series", padded=True)
    model(batch.inputs, batch.valid, labels=torch.tensor([0, 2, 1])).loss.backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"data2vec2.context.mask_token"}
    encoder = load("AutoModel", out)
    with torch.no_grad():
        expected = encoder(batch.inputs, batch.valid).last_hidden_state
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        assert torch.equal(compiled(batch.inputs, batch.valid).last_hidden_state, expected)
        hidden = encoder(batch.inputs, bool_masked_pos=batch.masked_rt).last_hidden_state
        assert not torch.allclose(hidden, encoder(batch.inputs).last_hidden_state, atol=1e-2)
        for dtype in (torch.float16, torch.bfloat16):
            output = load("AutoModel", out, dtype=dtype)(batch.inputs, batch.valid).last_hidden_state
            assert output.dtype is dtype
            assert ((output.float() - expected).norm() / expected.norm()) < 0.03


REFUSED: list[tuple[Any, str]] = [
    ([], "no arrays"),
    (np.zeros((2, 3, 40, 5)), r"shape \(2, 3, 40, 5\)"),
    ([np.zeros((2, 40)), np.zeros((3, 40))], r"Array 1 has the shape \(3, 40\)"),
    ([np.zeros((2, 0))], "Array 0 has the shape"),
    ([np.zeros((2, 81))], "81 steps along time, more than 80"),
    ([np.full((2, 4), np.nan)], "8 NaN of 8"),
    ([np.full((2, 4), np.inf)], "infinite"),
    ([np.full((2, 4), 1e300)], "too large"),
    ([np.zeros((2, 4), complex)], "complex128"),
    ([np.array([["a", "b"]] * 2)], "no real numbers"),
    ([[0.0, 1.0], [1.0]], "rows differ"),
    ("file.npy", "no real numbers"),
    (3.0, "has the shape"),
    (None, "no real numbers"),
    (np.zeros((0, 2, 8)), "no arrays"),
    ([np.ma.masked_array(np.zeros((2, 8)), mask=True)], "masked array"),
]


def test_what_a_processor_cannot_use_is_refused_by_its_place(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor

    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_series", tmp_path)), str(out)]) == 0
    processor = AutoFeatureExtractor.from_pretrained(out, trust_remote_code=True)
    for given, told in REFUSED:
        with pytest.raises(ValueError, match=told):
            processor(given)
    nested = processor([[[0.0, 1.0], [1.0, 2.0]]])
    assert np.array_equal(nested["values"], processor(torch.tensor([[[0.0, 1.0], [1.0, 2.0]]]))["values"])
    assert nested["values"].shape == (1, 2, 80)
    for changed in ({"transform": "fft"}, {"missing": "zero"}, {"normalise": "batch"}):
        with pytest.raises(ValueError, match=next(iter(changed.values()))):
            AutoFeatureExtractor.from_pretrained(out, trust_remote_code=True, **changed)
    model = load("AutoModel", out)
    with pytest.raises(ValueError, match=r"\(1, 2, 40\)"):
        model(torch.zeros(1, 2, 40))
    with pytest.raises(ValueError, match="of patches"):
        model(torch.zeros(1, 2, 80), torch.ones(1, 80))


@pytest.mark.parametrize("window", ["hanning", "hamming", "povey", "blackman", "rectangular"])
def test_a_processors_log_mel_is_that_of_training_bit_by_bit(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the settings, and in as many pieces."""
    for rate, low, high, bands in ((16_000, 20.0, None, 128), (44_100, 50.0, 20_000.0, 16)):
        config = LogMel(sample_rate=rate, window=window, low_hz=low, high_hz=high)
        time = ArrayAxis(patch=4, extent=2000)
        stem = ArrayStem(axes={"band": ArrayAxis(patch=4, extent=bands), "time": time}, transform="log_mel")
        stem.log_mel = config
        processor = feature_extraction_data2vec2_array.Data2Vec2ArrayProcessor(
            axes=list(stem.axes),
            patch=stem.patch,
            extents=stem.extents,
            longer=("refuse", "refuse"),
            transform="log_mel",
            log_mel=huggingface_array._log_mel(config),
        )
        wave = np.random.default_rng(0).normal(size=2 * rate).astype(np.float32)
        for at_once in (1 << 21, 1 << 15):
            monkeypatch.setattr(feature_extraction_data2vec2_array, "_VALUES_AT_ONCE", at_once)
            monkeypatch.setattr(log_mel, "_VALUES_AT_ONCE", at_once)
            ours = log_mel.Spectrum(wave, config, bands).whole()
            np.testing.assert_array_equal(processor._spectrum(wave, "Array 0"), ours)
        given = processor(wave, sampling_rate=rate)
        assert given["values"].shape == (1, 1, bands, 2000)
        for held, told in (
            (wave[: config.length - 1], "less than a window"),
            ((wave * 1000).astype(np.int16), "of floating point in -1"),
            (np.stack([wave, wave * np.nan]), "Array 1 holds values that are not finite"),
            (wave[None, None], "give waveforms"),
        ):
            with pytest.raises(ValueError, match=told):
                processor(held)
        with pytest.raises(ValueError, match=f"takes waveforms of {rate} samples a second: resample them"):
            processor(wave, sampling_rate=rate + 1)


def test_hidden_patches_of_2_0_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v2_maps", tmp_path)), str(out)]) == 0
    batch = tiny_models.batch("v2_maps")
    with pytest.raises(ValueError, match="no mask token"):
        load("AutoModel", out)(batch.inputs, bool_masked_pos=batch.masked_rt)


def test_arrays_under_our_own_names_are_an_encoder(tmp_path: Path) -> None:
    case = "2.0 along three axes, logarithm, NaN"
    run, out = checkpoint_of_recipe(CASES[case][0], tmp_path), tmp_path / "plain"
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0
    expected = d2v_scale.load_encoder(run, device="cpu").embed(arrays_of(case))
    assert torch.equal(d2v_scale.load_encoder(out, device="cpu").embed(arrays_of(case)), expected)


def test_the_references_format_has_no_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert tool("export").main([str(checkpoint_of("v2_maps", tmp_path)), str(out), "--to", "fairseq"]) == 2
    assert "maps, a stem of the kind array" in capsys.readouterr().err
    assert not out.exists()


BARE = """
import sys

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel

for folder in sys.argv[1:]:
    processor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        pooled = model(**processor(np.load("array.npy"), return_tensors="pt")).pooler_output
    assert torch.allclose(pooled, torch.from_numpy(np.load("pooled.npy")), atol=1e-5)
assert not any(name.split(".")[0] == "d2v_scale" for name in sys.modules)
print("same")
"""


def test_a_folder_of_arrays_needs_nothing_but_transformers(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor

    run, out, again = checkpoint_of("v2_cubes", tmp_path), tmp_path / "hf", tmp_path / "again"
    assert tool("export").main([str(run), str(out)]) == 0
    load("AutoModel", out).save_pretrained(again)
    AutoFeatureExtractor.from_pretrained(out, trust_remote_code=True).save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["auto_map"]
    array = np.random.default_rng(0).normal(size=(1, 9, 5, 6))
    np.save(tmp_path / "array.npy", array)
    np.save(tmp_path / "pooled.npy", d2v_scale.load_encoder(run, device="cpu").embed([array]).numpy())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BARE, str(out), str(again)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout
