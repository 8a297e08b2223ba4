"""What no class of transformers computes: modelling files of our own beside the weights, and what their config says."""

from pathlib import Path
from typing import Any

from d2v_scale.interop.huggingface import model_of, row_of
from d2v_scale.interop.keymap import KeyMap
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import parts_of

MASKING = ("mask_embedding", "mask_token")
"""Ends of names of parameters that only masking needs."""
_MODULES: tuple[str, ...] = ("modeling_data2vec2", "configuration_data2vec2", "layers_data2vec2")


def modelling_files(config: ModelConfig, modality: str) -> list[Path]:
    """All that an exported folder needs; the first imports the others."""
    row = row_of(config, modality)
    modules = dict.fromkeys((row.remote_module, *row.remote_imports, *_MODULES))
    return [Path(__file__).with_name(f"{module}.py") for module in modules]


def remote_code_keys(names: list[str], config: ModelConfig, modality: str) -> KeyMap:
    """Our encoder names without the stem's prefix; blocks before the main ones are counted with them. Of samples of
    several parts the names are our own."""
    keys = KeyMap(initialised=("predictors.",))
    if row_of(config, modality).names_are_ours:
        stems = tuple(f"stems.{part}." for part in parts_of(modality))
        for name in names:
            # Nothing is masked there.
            if name.startswith((*stems, "blocks.", "final_norm.")) and not name.endswith(MASKING):
                keys.add(name, name)
        return keys
    stem, prenet = f"stems.{modality}.", config.of(modality).backbone.prenet_depth
    for name in names:
        if name.startswith(f"{stem}prenet."):
            keys.add(name, f"blocks.{name.removeprefix(f'{stem}prenet.')}")
        elif name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            keys.add(name, f"blocks.{prenet + int(index)}.{rest}")
        elif name.startswith(stem):
            keys.add(name, name.removeprefix(stem))
        elif name.startswith("final_norm."):
            keys.add(name, name)
    return keys


def remote_code_settings(config: ModelConfig, modality: str) -> dict[str, Any]:
    """config.json. Its model type is no class's, so that loading without the modelling file fails."""
    row, model = row_of(config, modality), model_of(config, modality)
    backbone = model.backbone
    return {
        "model_type": "data2vec2",
        "architectures": [row.remote_classes["AutoModel"]],
        # Every head, whatever is exported: from_pretrained puts a new one on an encoder.
        "auto_map": {
            "AutoConfig": f"configuration_data2vec2.{row.remote_configuration}",
            **{auto: f"{row.remote_module}.{name}" for auto, name in row.remote_classes.items()},
        },
        "modality": row.remote_modality,
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
        **row.remote_settings(model),
    }
