"""2.0 speech and vision for Hugging Face: modelling files of our own beside the weights, and what their config says."""

from pathlib import Path
from typing import Any

from d2v_scale.interop.keymap import KeyMap
from d2v_scale.model.config import Modality, ModelConfig

MODELLING_FILE = Path(__file__).with_name("modeling_data2vec2.py")
IMAGE_PROCESSOR_FILE = Path(__file__).with_name("image_processing_data2vec2.py")
MODELLING_FILES = (
    MODELLING_FILE,
    *(Path(__file__).with_name(f"{part}_data2vec2.py") for part in ("configuration", "layers")),
)
"""All that an exported folder needs; the first imports the others."""
_CONFIGURATIONS: dict[Modality, str] = {"speech": "Data2Vec2AudioConfig", "vision": "Data2Vec2VisionConfig"}
_CLASSES: dict[Modality, dict[str, str]] = {
    "speech": {
        "AutoModel": "Data2Vec2AudioModel",
        "AutoModelForCTC": "Data2Vec2ForCTC",
        "AutoModelForAudioClassification": "Data2Vec2ForSequenceClassification",
        "AutoModelForAudioFrameClassification": "Data2Vec2ForAudioFrameClassification",
    },
    "vision": {
        "AutoModel": "Data2Vec2VisionModel",
        "AutoModelForImageClassification": "Data2Vec2ForImageClassification",
    },
}


def remote_class(auto: str, modality: Modality) -> str:
    """The class that one of transformers' automatic classes loads."""
    return _CLASSES[modality][auto]


def remote_code_keys(names: list[str], config: ModelConfig, modality: Modality) -> KeyMap:
    """Our encoder names without the stem's prefix; blocks before the main ones are counted with them."""
    keys = KeyMap(initialised=("predictors.",))
    stem, prenet = f"stems.{modality}.", config.backbone.prenet_depth
    for name in names:
        if name.startswith(f"{stem}prenet."):
            keys.add(name, f"blocks.{name.removeprefix(f'{stem}prenet.')}")
        elif name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            keys.add(name, f"blocks.{prenet + int(index)}.{rest}")
        elif name.startswith(stem):
            keys.add(name, name.removeprefix(stem))
    return keys


def remote_code_settings(config: ModelConfig, modality: Modality) -> dict[str, Any]:
    """config.json. Its model type is no class's, so that loading without the modelling file fails."""
    backbone = config.backbone
    settings: dict[str, Any] = {
        "model_type": "data2vec2",
        "architectures": [remote_class("AutoModel", modality)],
        # Every head, whatever is exported: from_pretrained puts a new one on an encoder.
        "auto_map": {
            "AutoConfig": f"configuration_data2vec2.{_CONFIGURATIONS[modality]}",
            **{auto: f"{MODELLING_FILE.stem}.{name}" for auto, name in _CLASSES[modality].items()},
        },
        "modality": modality,
        # Sizes that no other class can be built with: loading the weights into one fails instead of being wrong.
        "hidden_size": 1,
        "num_attention_heads": 2,
        "width": backbone.width,
        "depth": backbone.prenet_depth + backbone.depth,
        "heads": backbone.heads,
        "ffn": backbone.ffn,
        "layer_norm_eps": backbone.norm_eps,
        "hidden_dropout": backbone.dropout,
        "attention_dropout": backbone.attention_dropout,
        "activation_dropout": backbone.activation_dropout,
        "dtype": "float32",
    }
    if config.speech is not None and modality == "speech":
        settings |= {
            "conv_layers": [list(layer) for layer in config.speech.conv_layers],
            "pos_conv_depth": config.speech.pos_conv_depth,
            "pos_conv_kernel": config.speech.pos_conv_kernel,
            "pos_conv_groups": config.speech.pos_conv_groups,
            "alibi": config.speech.alibi,
        }
    elif config.vision is not None:
        settings |= {
            "image_size": config.vision.image_size,
            "patch_size": config.vision.patch_size,
            "num_channels": config.vision.channels,
        }
    return settings
