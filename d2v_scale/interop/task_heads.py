"""Heads of fine-tuned models in Hugging Face's classes: names and configurations."""

from typing import Any

from d2v_scale.data.labels import Vocabulary
from d2v_scale.errors import CheckpointError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.interop.huggingface import REMEDY, is_native, row_of
from d2v_scale.interop.huggingface_row import Head
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.model.config import ModelConfig

# The encoder is an attribute of the task's class; these are not below it.
_HEADS = ("lm_head.", "classifier.", "projector.", "head_norm.")


def head_of(task: TaskConfig, model: ModelConfig, modality: str) -> Head:
    """The classes of a fine-tuned model. Raises CheckpointError where there are none."""
    head = row_of(model, modality).heads.get(task.kind)
    if head is None:
        raise CheckpointError(f"transformers has no class for task.kind {task.kind!r} on {modality}.", REMEDY)
    return head


def auto_class(task: TaskConfig | None, model: ModelConfig, modality: str) -> str:
    """The class of transformers that a user loads the encoder, or the fine-tuned model, with."""
    return "AutoModel" if task is None else head_of(task, model, modality).auto


def add_head(keys: KeyMap, task: TaskConfig, model: ModelConfig, modality: str) -> None:
    """The head's entries, beside those of the encoder, all without the encoder's prefix."""
    row_of(model, modality).add_head(keys, task, is_native(model, modality))


def prefixed(name: str, model: ModelConfig, modality: str) -> str:
    """A name of the encoder or of its head, as the task's class has it."""
    encoder = row_of(model, modality).native_prefix if is_native(model, modality) else "data2vec2"
    return name if name.startswith(_HEADS) else f"{encoder}.{name}"


def head_settings(task: TaskConfig, model: ModelConfig, modality: str, classes: list[str] | None) -> dict[str, Any]:
    """What config.json has beside the encoder's settings, or in place of them."""
    row, head = row_of(model, modality), head_of(task, model, modality)
    name = head.native if is_native(model, modality) else row.remote_classes[head.auto]
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
    return settings | row.head_settings()
