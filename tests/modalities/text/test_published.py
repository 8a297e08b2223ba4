"""Tokenizers that Hugging Face's library reads: the ids are transformers' own, and what does not fit is named."""

import json
import pydoc_data.topics
from pathlib import Path

import pytest
from byte_level import SPECIAL, SPECIAL_WORDS, published, train

from d2v_scale.errors import ConfigError, DataError
from d2v_scale.modalities.text.tokenizer import (
    open_tokenizer,
    tokenizer_file,
    tokenizer_sha256,
    usable_tokenizer,
)
from d2v_scale.model.stem_config import TextStem

WORDS = " ".join(pydoc_data.topics.topics.values()).split()
DIFFICULT = [
    *["", " ", "  two   spaces ", "tab\tand\nline", "ﬁ ü é 日本語 🎉", "don't — stop…", "x" * 300, "a b", "\r\n"],
    *["a <mask> b", "</s>", "1,234.5%", "naïve café", "e\u0301", "\u200b"],
]


def theirs(folder: Path, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids: list[list[int]] = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    return ids


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("space", [False, True])
def test_ids_are_those_of_transformers(form: str, space: bool, tmp_path: Path) -> None:
    folder = published(tmp_path, form, space=space)
    texts = DIFFICULT + [" ".join(WORDS[k : k + 12]) for k in range(0, 2000, 10)]
    tokenizer = open_tokenizer(tokenizer_file(folder))
    assert tokenizer.path.name == form
    assert [[0, *tokenizer(text).tolist()] for text in texts] == theirs(folder, texts)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert tokenizer.decode([0, *tokenizer("don't stop")]).strip() == "don't stop"
    assert "".join(map(tokenizer.piece, tokenizer("two words"))).lstrip("\u2581") == "two\u2581words</s>"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_ten_thousand_sentences_get_the_ids_of_transformers(form: str, tmp_path: Path) -> None:
    folder = published(tmp_path, form)
    tokenizer = open_tokenizer(tokenizer_file(folder))
    sentences = list(dict.fromkeys(" ".join(WORDS[k : k + 12]) for k in range(0, len(WORDS), 5)))[:10_000]
    assert len(sentences) == 10_000
    assert [[0, *tokenizer.encode(text), 2] for text in sentences] == theirs(folder, sentences)


def test_what_a_file_was_saved_with_for_other_programs_is_not_done(tmp_path: Path) -> None:
    """A tokenizer.json that truncates would cut every document."""
    file = tokenizer_file(published(tmp_path, "tokenizer.json"))
    whole = open_tokenizer(file)("some words " * 30).tolist()
    held = json.loads(file.read_text())
    held["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    fixed = {"strategy": {"Fixed": 600}, "direction": "Right", "pad_to_multiple_of": None}
    held["padding"] = fixed | {"pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    file.write_text(json.dumps(held))
    assert open_tokenizer(file)("some words " * 30).tolist() == whole


@pytest.mark.parametrize("lacking", SPECIAL_WORDS)
def test_a_lacking_special_word_is_named(lacking: str, tmp_path: Path) -> None:
    train(tmp_path, [word for word in SPECIAL_WORDS if word != lacking]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=rf"tokenizer.json lacks {lacking}: .*Train it again with"):
        usable_tokenizer(tmp_path)


def test_words_that_are_called_otherwise_are_found(tmp_path: Path) -> None:
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "<hidden>"]
    train(tmp_path, words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "<hidden>"}}))
    assert open_tokenizer(usable_tokenizer(tmp_path)).special_ids == (0, 1, 2, 3, 4)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json, beside a tokenizer, cannot be read"):
        usable_tokenizer(tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        usable_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read.*Give a tokenizer.json, or a vocab.json"):
        usable_tokenizer(tmp_path)
    (tmp_path / "b").mkdir()
    folder = published(tmp_path / "b", "vocab.json")
    (folder / "merges.txt").rename(folder / "elsewhere.txt")
    with pytest.raises(DataError, match=r"vocab.json cannot be read.*its merges.txt beside it"):
        usable_tokenizer(folder)
    (tmp_path / "c").mkdir()
    folder = published(tmp_path / "c", "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    with pytest.raises(DataError, match="differ in add_prefix_space: False and True"):
        usable_tokenizer(folder)


def test_a_tokenizer_is_known_by_all_that_its_ids_depend_on(tmp_path: Path) -> None:
    file = tokenizer_file(published(tmp_path, "vocab.json"))
    assert tokenizer_file(tmp_path / "merges.txt") == file
    known = {tokenizer_sha256(file)}
    (tmp_path / "merges.txt").write_text((tmp_path / "merges.txt").read_text() + "z z\n")
    known.add(tokenizer_sha256(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    assert len(known | {tokenizer_sha256(file)}) == 3


def test_a_model_of_other_ids_is_refused(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file(published(tmp_path, "tokenizer.json")))
    assert tokenizer.stem == TextStem(vocab_size=tokenizer.size, **SPECIAL)
    tokenizer.check(tokenizer.stem)
    with pytest.raises(ConfigError, match=r"model.text.mask_id: .*Set model.text.mask_id to 4"):
        tokenizer.check(TextStem(vocab_size=600, mask_id=599))
    with pytest.raises(ConfigError, match="special ids"):
        tokenizer.check(TextStem(vocab_size=600, **SPECIAL | {"pad_id": 9}))
    with pytest.raises(ConfigError, match=r"model.text.vocab_size"):
        tokenizer.check(TextStem(vocab_size=100, **SPECIAL))
