"""Heads of fine-tuned models in Hugging Face's classes: names, configurations, tokenizer of a CTC model."""

import json
from pathlib import Path
from typing import Any

from d2v_scale.data.labels import Vocabulary
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.heads import PROJECTION
from d2v_scale.interop.huggingface import is_native
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.interop.remote_code import remote_class
from d2v_scale.model.config import Modality, ModelConfig

# The encoder is an attribute of the task's class; these are not below it.
_HEADS = ("lm_head.", "classifier.", "projector.", "head_norm.")

AUTO_CLASSES = {
    ("vision", False): "AutoModelForImageClassification",
    ("text", False): "AutoModelForSequenceClassification",
    ("speech", False): "AutoModelForAudioClassification",
    ("speech", True): "AutoModelForCTC",
}
_NATIVE = {
    "AutoModelForImageClassification": "Data2VecVisionForImageClassification",
    "AutoModelForSequenceClassification": "Data2VecTextForSequenceClassification",
    "AutoModelForAudioClassification": "Data2VecAudioForSequenceClassification",
    "AutoModelForCTC": "Data2VecAudioForCTC",
}


def auto_class(task: TaskConfig, modality: Modality) -> str:
    """The class of transformers that a user loads the model with."""
    return AUTO_CLASSES[modality, task.kind == "ctc"]


def add_head(keys: KeyMap, task: TaskConfig, model: ModelConfig, modality: Modality) -> None:
    """The head's entries, beside those of the encoder, all without the encoder's prefix."""
    if task.kind == "ctc":
        keys.layer("head.out", "lm_head")
    elif modality == "vision":
        keys.layer("head.norm", "pooler.layernorm" if is_native(model, modality) else "head_norm")
        keys.layer("head.out", "classifier")
    elif modality == "text":
        keys.layer("head.dense", "classifier.dense")
        keys.layer("head.out", "classifier.out_proj")
    else:
        keys.layer("head.dense", "projector")
        keys.layer("head.out", "classifier")


def prefixed(name: str, model: ModelConfig, modality: Modality) -> str:
    """A name of the encoder or of its head, as the task's class has it."""
    native = {"speech": "data2vec_audio", "text": "data2vec_text", "vision": "data2vec_vision"}
    encoder = native[modality] if is_native(model, modality) else "data2vec2"
    return name if name.startswith(_HEADS) else f"{encoder}.{name}"


def head_settings(
    task: TaskConfig, model: ModelConfig, modality: Modality, classes: list[str] | None
) -> dict[str, Any]:
    """What config.json has beside the encoder's settings, or in place of them."""
    auto = auto_class(task, modality)
    name = _NATIVE[auto] if is_native(model, modality) else remote_class(auto, modality)
    settings: dict[str, Any] = {"architectures": [name]}
    if task.kind == "ctc":
        return settings | {
            "vocab_size": len(Vocabulary(task.ctc.letters)),
            "pad_token_id": Vocabulary.blank,
            "ctc_loss_reduction": "sum",
            "ctc_zero_infinity": True,
        }
    count = 1 if task.kind == "regress" else task.classes or 0
    names = classes if classes is not None and len(classes) == count else [f"LABEL_{k}" for k in range(count)]
    settings |= {"id2label": {str(k): name for k, name in enumerate(names)}}
    settings |= {"label2id": {name: k for k, name in enumerate(names)}}
    settings["problem_type"] = "regression" if task.kind == "regress" else "single_label_classification"
    if modality == "vision":
        settings["use_mean_pooling"] = True
    elif modality == "text":
        settings["classifier_dropout"] = 0.0
    else:
        settings["classifier_proj_size"] = PROJECTION
    return settings


def write_ctc_tokenizer(vocabulary: Vocabulary, out: Path) -> None:
    """vocab.json, tokenizer_config.json and special_tokens_map.json of a Wav2Vec2CTCTokenizer."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {
        "tokenizer_class": "Wav2Vec2CTCTokenizer",
        "processor_class": "Wav2Vec2Processor",
        "word_delimiter_token": "|",
        "do_lower_case": False,
        **special,
    }
    files = {
        "vocab.json": {piece: number for number, piece in enumerate(vocabulary.pieces)},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": special,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
