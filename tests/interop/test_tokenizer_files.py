import pydoc_data.topics
from pathlib import Path

import pytest
import sentencepiece

from d2v_scale.errors import DataError
from d2v_scale.interop.tokenizer_files import write_tokenizer
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.modalities.text.tokenizer import open_tokenizer
from d2v_scale.model.stem_config import TextStem

TEXTS = [paragraph for topic in list(pydoc_data.topics.topics.values())[:20] for paragraph in topic.split("\n\n")]
DIFFICULT = ["", "  two   spaces ", "tab\tand\nline", "ﬁ ü é 日本語 🎉", "don't — stop…", "x" * 300]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_auto_tokenizer_gives_the_ids_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "tokenizer.model"
    tokenizer_training.train(TEXTS, model, vocab_size=600, kind=kind)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    # Two ids between the last piece and <mask> stay unused.
    stem = TextStem(vocab_size=603, mask_id=602, max_positions=64)
    write_tokenizer(open_tokenizer(model), stem, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    # Unigram cuts of equal score ("**" "*" and "*" "**") are broken differently: the same pieces in another order.
    as_compared = sorted if kind == "unigram" else list
    texts = TEXTS + DIFFICULT
    differing = [t for t in texts if as_compared(loaded(t)["input_ids"]) != as_compared([0, *pieces.encode(t), 2])]
    assert differing == []
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)
    assert loaded.mask_token_id == stem.mask_id
    assert loaded("a <mask> b")["input_ids"].count(stem.mask_id) == 1
    assert loaded.decode(loaded("hello world")["input_ids"], skip_special_tokens=True) == "hello world"


def test_ten_thousand_sentences_get_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "tokenizer.model"
    tokenizer_training.train(TEXTS, model, vocab_size=600, kind="bpe")
    write_tokenizer(open_tokenizer(model), TextStem(vocab_size=601, mask_id=600, max_positions=64), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    words = " ".join(pydoc_data.topics.topics.values()).split()
    sentences = list(dict.fromkeys(" ".join(words[k : k + 12]) for k in range(0, len(words), 5)))[:10_000]
    assert len(sentences) == 10_000
    found = loaded(sentences)["input_ids"]
    assert found == [[0, *ids, 2] for ids in pieces.encode(sentences)]


def test_a_tokenizer_with_more_pieces_than_the_model_has_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    tokenizer_training.train(TEXTS, model, vocab_size=600)
    with pytest.raises(DataError, match="<mask>"):
        write_tokenizer(open_tokenizer(model), TextStem(vocab_size=500, mask_id=499), tmp_path)
