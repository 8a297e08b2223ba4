"""`d2v inspect`: what a set holds, in hours, tokens and samples of each class."""

from pathlib import Path

import numpy as np
import pytest
from small_shards import documents, image_samples, npy, sound_samples

from d2v_scale.commands import inspect_shards
from d2v_scale.conversion.measures import measure_of
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.shards.shard_index import SetIndex
from d2v_scale.shards.writing import write_set


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert inspect_shards.main([str(folder)]) == 0
    return capsys.readouterr().out


def test_hours_and_samples_of_each_class_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = sound_samples(8, seconds=(90.0, 90.001))
    del samples[7]["cls"]
    write_set(
        tmp_path, "train", "recording", samples, per_shard=5, measure=measure_of("recording"), classes=list("abc")
    )
    printed = said(tmp_path, capsys)
    assert "in all 0.20 hours" in printed
    assert "  a: 3\n  b: 2\n  c: 2\n  without a label of these: 1" in printed


def test_tokens_are_told_of_texts_and_no_length_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = documents(30)
    tokenizer_training.train(texts, tmp_path / "t.model", vocab_size=290)
    samples = [{"__key__": f"{k:03d}", "txt": text} for k, text in enumerate(texts)]
    measure = measure_of("text", tmp_path / "t.model")
    write_set(tmp_path, "train", "text", samples, per_shard=20, measure=measure, tokenizer=tmp_path / "t.model")
    total = sum(shard.length for shard in SetIndex.load(tmp_path / "train.index.json").shards)
    assert f"in all {total:,} tokens" in said(tmp_path, capsys)
    write_set(tmp_path / "images", "train", "image", image_samples(3), per_shard=3)
    assert "in all" not in said(tmp_path / "images", capsys)


def test_lengths_that_are_all_alike_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [{"__key__": f"{k}", "npy": npy(np.full((2, 20, 5), k, np.int16))} for k in range(4)]
    write_set(tmp_path, "train", "array", samples, per_shard=4, measure=measure_of("array"))
    printed = said(tmp_path, capsys)
    assert "length, steps: 20 of each\n" in printed
    assert "#" not in printed
