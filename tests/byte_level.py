"""Small byte-level tokenizers as Hugging Face publishes them."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

SPECIAL_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SPECIAL = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "mask_id": 4}


def train(folder: Path, words: list[str], *, space: bool = False, size: int = 400) -> Any:
    """A byte-level BPE of `size` ids, the special words first."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    made = ByteLevelBPETokenizer(add_prefix_space=space)
    texts = list(pydoc_data.topics.topics.values())[:20]
    made.train_from_iterator(texts, vocab_size=size, special_tokens=words, show_progress=False)
    if {"<s>", "</s>"} <= set(words):
        made.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), True, space)
    return made


def published(folder: Path, form: str, *, space: bool = False, size: int = 400) -> Path:
    """`folder` with a tokenizer as RoBERTa's: tokenizer.json, or vocab.json and merges.txt."""
    made = train(folder, SPECIAL_WORDS, space=space, size=size)
    if form == "tokenizer.json":
        made.save(str(folder / form))
    else:
        made.save_model(str(folder))
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": space}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
