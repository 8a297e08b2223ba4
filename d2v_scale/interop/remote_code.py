"""2.0 speech and vision for Hugging Face: a modelling file of our own beside the weights, and what its config says."""

from pathlib import Path
from typing import Any

from d2v_scale.interop.keymap import KeyMap
from d2v_scale.model.config import Modality, ModelConfig

MODELLING_FILE = Path(__file__).with_name("modeling_data2vec2.py")


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
        "architectures": ["Data2Vec2Model"],
        "auto_map": {
            "AutoConfig": f"{MODELLING_FILE.stem}.Data2Vec2Config",
            "AutoModel": f"{MODELLING_FILE.stem}.Data2Vec2Model",
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
