"""Text weights of Hugging Face with their tokenizer: imported, learned from, exported, and known again."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_level import published
from exported_models import tool
from launch import ROOT, run_ranks
from small_shards import documents

from d2v_scale.api.encoder import load_encoder
from d2v_scale.command_line import parse
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import DataError
from d2v_scale.finetuning.start import adopt
from d2v_scale.interop.encoder_source import check_tokenizer, open_encoder
from d2v_scale.interop.exporting import find_tokenizer
from d2v_scale.modalities.text.tokenizer import PUBLISHED, tokenizer_sha256
from d2v_scale.shards.shard_index import SetIndex


@pytest.fixture
def folder(tmp_path: Path, world_of_one: None) -> Path:
    """A random Data2VecText model with a tokenizer of its own."""
    from transformers import Data2VecTextConfig, Data2VecTextModel

    out = tmp_path / "published"
    out.mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = Data2VecTextConfig(vocab_size=400, max_position_embeddings=66, type_vocab_size=1, **sizes)
    Data2VecTextModel(config).save_pretrained(out)
    return published(out, "vocab.json")


def table(path: Path) -> Path:
    with path.open("w") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(("sentence", "label"))
        rows.writerows((text, k % 2) for k, text in enumerate(documents(24)))
    return path


def shards(folder: Path, tokenizer: Path) -> Path:
    call = ["text", str(table(folder / "train.tsv")), str(folder / "glue"), "--columns", "sentence,label"]
    assert tool("make_shards").main([*call, "--tokenizer", str(tokenizer), "--processes", "1"]) == 0
    return folder / "glue" / "train.index.json"


def test_glue_is_read_with_the_tokenizer_of_imported_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModel, AutoTokenizer

    assert tool("import_weights").main([str(folder), str(tmp_path / "ours")]) == 0
    assert "vocab.json: what `d2v shards text` --tokenizer takes" in capsys.readouterr().out
    index = shards(tmp_path, tmp_path / "ours")
    # Of both files, as training compares it: that of vocab.json alone was refused there.
    assert SetIndex.load(index).tokenizer_sha256 == tokenizer_sha256(tmp_path / "ours" / "vocab.json")
    call = ["--recipe", "finetune_glue_sst2", "--init_from", str(tmp_path / "ours"), "--data", str(index)]
    recipe, options = parse(call)
    source = adopt(recipe, options)
    assert source is not None
    assert recipe.model.text is not None
    assert (recipe.model.text.mask_id, recipe.model.text.unk_id) == (4, 3)
    labelled = LabelledSet(str(index), "text", recipe.data, recipe.model, batch_size=24)
    check_tokenizer(source.path, source.tokenizer_sha256, "glue", labelled.tokenizer_sha256)
    [(batch, labels_b)] = labelled
    processor = AutoTokenizer.from_pretrained(folder)
    given = processor(
        [" ".join(text.split()) for text in documents(24)],
        padding=True,
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    assert labels_b.tolist() == [0, 1] * 12
    assert torch.equal(batch.inputs, given["input_ids"])
    # The folder's own token type is part of its positions here.
    theirs = AutoModel.from_pretrained(folder).eval()(**given).last_hidden_state[0, 0]
    held = load_encoder(tmp_path / "ours")
    ours = held._frozen.hidden_states(batch)[-1][0, 0]
    assert float((ours - theirs).abs().max()) < 1e-4
    assert torch.equal(held.embed(["a fox"]), load_encoder(folder).embed(["a fox"]))


def test_an_export_holds_the_tokenizer_by_which_it_is_known(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.json").unlink()
    published(folder, PUBLISHED)
    assert tool("import_weights").main([str(folder), str(tmp_path / "ours")]) == 0
    assert tool("export").main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--weights", "student"]) == 0
    assert (tmp_path / "hf" / PUBLISHED).read_bytes() == (folder / PUBLISHED).read_bytes()
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 64)
    source = open_encoder(tmp_path / "hf")
    assert source.tokenizer_sha256 == tokenizer_sha256(folder / PUBLISHED)
    assert find_tokenizer(source.recipe, source.path, source.tokenizer_sha256) == tmp_path / "hf" / PUBLISHED
    # An earlier export into the same folder may have left a tokenizer that is found first.
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"of another encoder")
    assert tool("export").main([str(tmp_path / "ours"), str(tmp_path / "hf"), "--weights", "student"]) == 0
    assert not (tmp_path / "hf" / "tokenizer.model").exists()
    other = tmp_path / "other"
    other.mkdir()
    published(other, PUBLISHED, size=390)
    with pytest.raises(DataError, match=r"is tokenised by another tokenizer \(sha256"):
        check_tokenizer(source.path, source.tokenizer_sha256, "x", tokenizer_sha256(other / PUBLISHED))
    call = [str(tmp_path / "ours"), str(tmp_path / "no"), "--weights", "student", "--tokenizer", str(other)]
    assert tool("export").main(call) == 2
    assert not (tmp_path / "no" / "model.safetensors").exists()


def test_a_tokenizer_that_does_not_fit_is_left_behind_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "vocab.json").unlink()
    published(folder, PUBLISHED, size=420)
    assert tool("import_weights").main([str(folder), str(tmp_path / "ours")]) == 0
    told = capsys.readouterr().out
    assert "tokenizer: left behind, since it does not fit the weights: model.text.vocab_size: is 400" in told
    assert not (tmp_path / "ours" / PUBLISHED).exists()


@pytest.mark.slow
def test_a_glue_recipe_runs_from_imported_weights(folder: Path, tmp_path: Path) -> None:
    """As docs/encoders.md says."""
    assert tool("import_weights").main([str(folder), str(tmp_path / "ours")]) == 0
    index = shards(tmp_path, tmp_path / "ours")
    call = ["--recipe", "finetune_glue_sst2", "--init_from", str(tmp_path / "ours"), "--data", str(index)]
    short = ["--optim.max_steps", "2", "--optim.warmup_steps", "1", "--global_batch_size", "8", "--data.workers", "0"]
    quiet = ["--tracking.enabled", "false", "--evaluation.test", str(index), "--evaluation.every", "2"]
    run_ranks(1, ROOT / "d2v_scale" / "train.py", *call, *short, *quiet, "--run_dir", str(tmp_path / "tuned"))
    assert tool("export").main([str(tmp_path / "tuned"), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()
    [program] = re.findall(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "hf", capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr
