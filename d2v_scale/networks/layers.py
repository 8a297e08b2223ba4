"""A model as one list of layers, from which student, teacher, plans and pipelines are made."""

from d2v_scale import modalities
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.layers import LayerSpec


def describe(config: ModelConfig, modality: str) -> list[LayerSpec]:
    """The layers that a sample of `modality` passes, in order."""
    stem = f"stems.{modality}"
    layers = [LayerSpec("features", f"{stem}.features"), LayerSpec("context", f"{stem}.context")]
    if modalities.of(config, modality).has_bias:
        layers.append(LayerSpec("bias", f"{stem}.bias"))
    one = config.of(modality)
    prenet = one.backbone.prenet_depth
    layers += [LayerSpec("block", f"{stem}.prenet.{i}", index=i) for i in range(prenet)]
    layers += [LayerSpec("block", f"blocks.{i}", index=prenet + i, main=i) for i in range(config.backbone.depth)]
    if config.backbone.final_norm:
        layers.append(LayerSpec("final_norm", "final_norm"))
    layers.append(LayerSpec("predictor", f"predictors.{one.predictor_name}"))
    return layers
