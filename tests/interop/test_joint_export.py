"""Encoders of samples with several parts as Hugging Face models: any subset of parts gives what `load_encoder` does."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from exported_models import checkpoint_of_recipe, tool
from host_models import load
from PIL import Image
from small_shards import documents

import d2v_scale
from d2v_scale.data.config import DataConfig, SourceConfig, TextData
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.modalities.text.tokenizer_training import train
from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import Recipe

pytestmark = pytest.mark.usefixtures("world_of_one")

THREE = ("vision", "speech", "text")
LIMIT = 1e-5


def model_of(case: str) -> ModelConfig:
    """1.0; 2.0 with further tokens and an array; 2.0 of blocks that differ in all that they can."""
    model = tiny_models.paired(case[:2], **(tiny_models.PRE if case == "v2 pre-norm" else {}))
    assert model.text is not None
    assert model.speech is not None
    model.text.vocab_size, model.text.mask_id = 331, 330
    if case == "v2":
        model.speech.extra_tokens = model.text.extra_tokens = 2
        model.arrays = {"series": tiny_models.arrays("series")}
        model.arrays["series"].paired = True
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    train(documents(200), path, vocab_size=330)
    return path


def run_of(case: str, tokenizer: Path, tmp_path: Path) -> Path:
    model = model_of(case)
    source = SourceConfig(shards="none", modality="+".join(model.stems), name="pairs")
    data = DataConfig(sources=[source], text=TextData(tokenizer=str(tokenizer)))
    objective = ObjectiveConfig(target=tiny_models.TAPS)
    return checkpoint_of_recipe(Recipe(name="pairs", model=model, objective=objective, data=data), tmp_path)


def samples(parts: tuple[str, ...]) -> dict[str, list[Any]]:
    """The first sample has all parts, each further one lacks one of them."""
    random = np.random.default_rng(0)
    count = 1 + len(parts) if len(parts) > 1 else 2
    made: dict[str, list[Any]] = {
        "vision": [random.integers(0, 255, (20 + k, 24, 3), dtype=np.uint8) for k in range(count)],
        "speech": [random.standard_normal(7000 + 900 * k).astype(np.float32) for k in range(count)],
        "text": ["the quick fox", "a dog jumps", np.array([7, 8, 2]), "one", "two words"][:count],
        "series": [random.standard_normal((2, 80 - 17 * k)).astype(np.float32) for k in range(count)],
    }
    for k, part in enumerate(parts if len(parts) > 1 else ()):
        made[part][1 + k] = None
    return {part: made[part] for part in parts}


@pytest.mark.parametrize("case", ["v1", "v2", "v2 pre-norm"])
def test_every_subset_of_parts_gives_what_the_encoder_gives(
    case: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of(case, tokenizer, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out), "--modality", "pairs"]) == 0
    assert "PASS" in capsys.readouterr().out
    from transformers import AutoProcessor

    # Written again by transformers, which sorts what is in it.
    AutoProcessor.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "again")
    load("AutoModel", out).save_pretrained(tmp_path / "again")
    processor = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    model = load("AutoModel", tmp_path / "again")
    encoder, exported = d2v_scale.load_encoder(run, device="cpu"), d2v_scale.load_encoder(out, device="cpu")
    names = tuple(encoder.stems)
    for parts in itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(1, 1 + len(names))):
        given = samples(parts)
        inputs = processor(given, return_tensors="pt")
        with torch.no_grad():
            whole = model(**inputs, output_hidden_states=True)
        pooled = encoder.embed(given)
        torch.testing.assert_close(whole.pooler_output, pooled, rtol=0, atol=LIMIT)
        torch.testing.assert_close(exported.embed(given), pooled, rtol=0, atol=LIMIT)
        places = whole.attention_mask.shape[1]
        for k, states_ltd in enumerate(encoder.layers(given)):
            real = whole.attention_mask[k].bool()
            theirs = torch.stack([layer[k, -places:][real] for layer in whole.hidden_states[1:]])
            torch.testing.assert_close(theirs, states_ltd, rtol=LIMIT, atol=LIMIT)


def test_a_processor_of_parts_says_what_is_none(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of("v2", tokenizer, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out), "--modality", "text+vision"]) == 0
    from transformers import AutoModel, AutoProcessor

    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(out, trust_remote_code=False)
    processor, model = AutoProcessor.from_pretrained(out, trust_remote_code=True), load("AutoModel", out)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    for given, said in [
        ({"smell": [image]}, "smell is no part of this encoder; it has vision, text"),
        ({}, "There are none"),
        ({"vision": [image], "text": ["a", "b"]}, "1 of vision, 2 of text"),
        ({"vision": [None], "text": [None]}, "Sample 0 has no part"),
        ({"vision": [image.astype(np.float32)]}, "vision of sample 0: an array of type float32"),
        ({"text": [np.array([1])]}, "text of sample 0: holds ids"),
        ({"text": [np.array([400])]}, "text of sample 0: holds ids"),
        ({"vision": ["a"]}, "str is no image"),
        ({"vision": np.stack([image, image])}, "vision of sample 0: an array of type uint8 and shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            processor(given)
    with pytest.raises(ValueError, match="sampling_rate is 8000, but this encoder takes no recordings"):
        processor(vision=[image], sampling_rate=8000)
    with pytest.raises(ValueError, match="speech is no input"):
        model(speech=torch.zeros(1, 400))
    with pytest.raises(ValueError, match="No part is given"):
        model()
    with pytest.raises(ValueError, match=r"vision has the shape \(1, 3, 8, 8\)"):
        model(vision=torch.zeros(1, 3, 8, 8))
    with pytest.warns(UserWarning, match="text: [0-9]+ tokens are more than 23"):
        assert processor(text=["the quick fox " * 20])["text"].shape == (1, 24)
    of_arrays, of_pillow = processor(vision=[image]), processor(vision=[Image.fromarray(image)])
    assert np.array_equal(of_arrays["vision"], of_pillow["vision"])
    assert set(of_arrays) == {"vision", "vision_present"}
    assert processor(vision=image, text="the quick fox")["text"].shape[0] == 1  # no list of characters
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(Path("README.md").read_text().partition("```python")[2].partition("```")[0], {})
    assert capsys.readouterr().out.startswith("torch.Size([1, ")


def test_encoders_with_another_epsilon_were_exported_with_that_of_their_blocks_in_the_stem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers has one for all norms; ours of features is 1e-5, whatever the blocks have. Large, it shows."""
    runs = {}
    for name in ("v2_text", "v1_speech"):
        model = tiny_models.model(name, norm_eps=0.1)
        recipe = Recipe(name=name, model=model, objective=ObjectiveConfig(target=tiny_models.target_of(name)))
        runs[name] = checkpoint_of_recipe(recipe, tmp_path / name)
    assert tool("export").main([str(runs["v1_speech"]), str(tmp_path / "speech")]) == 2
    assert "model.backbone.norm_eps" in capsys.readouterr().err
    out = tmp_path / "text"
    assert tool("export").main([str(runs["v2_text"]), str(out)]) == 0
    assert "modeling_data2vec2_joint.py" in capsys.readouterr().out
    assert tool("export").main([str(runs["v2_text"]), str(tmp_path / "graph"), "--to", "onnx"]) == 2
    assert "modelling file of several inputs" in capsys.readouterr().err
    from transformers import AutoProcessor

    texts = [np.array([5, 6, 7, 2]), np.array([8, 2])]
    expected = d2v_scale.load_encoder(runs["v2_text"], device="cpu").embed(texts)
    given = AutoProcessor.from_pretrained(out, trust_remote_code=True)(text=texts, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(load("AutoModel", out)(**given).pooler_output, expected, rtol=0, atol=LIMIT)
    again = d2v_scale.load_encoder(out, device="cpu").embed(texts)
    torch.testing.assert_close(again, expected, rtol=0, atol=LIMIT)
